"""Names -> tasks of the evaluation harness: tersely's own, a user's task file, or one that the harness has.

The harness (lm-eval) is an extra, and is imported only when a task is made. Nothing here reaches for the network: the
data of the harness's own tasks are taken from the data folder, or from what the datasets library has kept.
"""

from __future__ import annotations

import copy
import difflib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tersely.errors import DataError, UsageError
from tersely.evaluation.tasks.catalog import OWN, Own
from tersely.evaluation.tasks.scores import Kind
from tersely.evaluation.tasks.sources import Splits, Tokens

PREFIX = "harness:"
"""Before a name: the harness's own task, where tersely has one of the same name."""
_MOST_NAMES = 5
_READERS = {"json": "from_json", "csv": "from_csv", "parquet": "from_parquet", "text": "from_text"}
"""Forms of files that a task file may name as its data, and what of the datasets library reads them."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task that is ready to be asked.

    tasks: the harness's task objects by their names; parts: what each is called as a sub-task ("" where it is the only
    one); groups: the harness's groups that aggregate them; sizes: items that each has. metric and kind are None where
    the harness's task says what counts.
    """

    name: str
    title: str
    group: str
    metric: str | None
    kind: Kind | None
    chance: float | None
    tasks: Mapping[str, Any]
    parts: Mapping[str, str]
    groups: Mapping[str, Any]
    sizes: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def available(self) -> int:
        """Items that the data has."""
        return sum(self.sizes.values())


def require_harness() -> None:
    """Raises UsageError: the extra is not installed."""
    if any(find_spec(name) is None for name in ("lm_eval", "datasets")):
        raise UsageError("tasks need the evaluation harness, which is not installed: pip install 'tersely[tasks]'")


def resolve(name: str) -> Own | Path | str:
    """What a name means: a task of tersely's own, a task file, or a task of the harness (its name without prefix).

    Raises UsageError: none of these; the nearest names are in the message.
    """
    for own in OWN:
        if own.name == name:
            return own
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UsageError(f"{name}: no such task file; give the path of a YAML file in the harness's form")
        return Path(name)
    bare = name.removeprefix(PREFIX)
    known = _known()
    if bare in known:
        return bare
    names = [own.name for own in OWN] + sorted(known)
    near = difflib.get_close_matches(bare.lower(), names, _MOST_NAMES, 0.6)
    near += [found for found in names if bare.lower() in found.lower() and found not in near][: _MOST_NAMES - len(near)]
    near = list(dict.fromkeys(near))
    advice = (
        f"the nearest names are {', '.join(near)}" if near else "`tersely tasks` lists those that come with tersely"
    )
    raise UsageError(f"no task is called {name!r}; {advice}")


def check(name: str, data: Path | None) -> None:
    """See that a task can be asked, before any model is loaded. Raises what `prepare` raises."""
    found = resolve(name)
    if isinstance(found, Own):
        found.items(_folder(found, data), None)
    else:
        _foreign(found, data)


def prepare(name: str, data: Path | None, tokens: Tokens) -> Prepared:
    """Read a task's data and make its task objects.

    Raises UsageError: an unknown task, or one that is not for a text model or would run code that it brings; DataError:
    its data are not at hand, or not what they should be.
    """
    found = resolve(name)
    return _own(found, _folder(found, data), tokens) if isinstance(found, Own) else _foreign(found, data)


@contextmanager
def silence() -> Iterator[None]:
    """Discard what the harness and the datasets library print, log, warn of and draw."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# Tersely's own.


def _folder(own: Own, data: Path | None) -> Path:
    if data is None:
        raise DataError(f"{own.name}: its data are {own.where} in a folder of task data; name that folder (--data DIR)")
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; --data names the one that holds {own.where}, the data of {own.name}")
    return data


def _own(own: Own, data: Path, tokens: Tokens) -> Prepared:
    items = own.items(data, tokens)
    parts = {part: splits for part, splits in items.parts.items() if splits["test"]}
    tasks, names = {}, {}
    with silence():
        config = _task_file(own.name)
        if own.kind == "auc":  # members and others together
            whole = [item for splits in parts.values() for item in splits["test"]]
            tasks[own.name] = _token_task()(config=_configured(config, own.name, {"test": whole}))
            names[own.name] = ""
        else:
            for part, splits in parts.items():
                name = f"{own.name}_{part.replace(' ', '_')}" if part else own.name
                tasks[name] = _configurable()(config=_configured(config, name, splits))
                names[name] = part
        groups = _grouped(own.name, tasks, config) if len(tasks) > 1 else {}
    return Prepared(
        name=own.name,
        title=own.title,
        group=own.group,
        metric=own.metric,
        kind=own.kind,
        chance=own.chance,
        tasks=tasks,
        parts=names,
        groups=groups,
        sizes={name: len(task.eval_docs) for name, task in tasks.items()},
        notes=tuple(f"{own.name}: {note}" for note in items.notes),
    )


def _task_file(name: str) -> dict[str, Any]:
    from lm_eval.tasks.manager import load_yaml

    config: dict[str, Any] = load_yaml(Path(__file__).with_name(f"{name}.yaml"))
    return config


def _configured(config: Mapping[str, Any], name: str, splits: Splits) -> dict[str, Any]:
    from datasets import Dataset

    made = {split: Dataset.from_list(list(items)) for split, items in splits.items()}

    def data(**_metadata: Any) -> dict[str, Any]:
        return made

    fields = made["test"].features
    templates = {key: config[key] for key in ("doc_to_text", "doc_to_target") if config[key] not in fields}
    rendered = {key: _renderer(template) for key, template in templates.items()}
    return {**copy.deepcopy(dict(config)), **rendered, "task": name, "custom_dataset": data}


def _renderer(template: str) -> Callable[[Mapping[str, Any]], str]:
    """What the harness does with a template, which it would compile anew for every item."""
    from lm_eval.utils import env

    compiled = env.from_string(template)

    def render(item: Mapping[str, Any]) -> str:
        return str(compiled.render(**item))

    return render


def _grouped(name: str, tasks: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    metrics = [AggMetricConfig(metric=metric["metric"]) for metric in config["metric_list"]]
    group = Group(name, aggregate_metric_list=metrics)
    for task in tasks.values():
        group.add(task)
    return {name: group}


def _configurable() -> Any:
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask


@lru_cache
def _token_task() -> Any:
    """A task of the harness that asks for the log-probability of every token of a text."""
    from lm_eval.api.instance import Instance

    class TokenTask(_configurable()):  # type: ignore[misc]
        def construct_requests(self, doc: Mapping[str, Any], **given: Any) -> Any:
            return Instance(
                request_type="token_logprobs",
                doc=doc,
                arguments=(doc["text"], doc["tokens"]),
                idx=0,
                metadata=given["metadata"],
            )

    return TokenTask


# The harness's, and the user's.


@lru_cache
def _known() -> Mapping[str, Any]:
    """Every task, group and tag of the harness. Reading its task files takes seconds."""
    require_harness()
    with silence():
        from lm_eval.tasks import TaskManager

        index: Mapping[str, Any] = TaskManager().task_index
    return index


def _foreign(found: Path | str, data: Path | None) -> Prepared:
    """A task, group or tag of the harness by its name, or the one that a user's file defines."""
    require_harness()
    label = str(found)
    made: Any
    try:
        with silence():
            from lm_eval.tasks._index import Kind as Sort
            from lm_eval.tasks._index import TaskIndex

            entry = TaskIndex.entry_from_path(found) if isinstance(found, Path) else _known()[found]
            if entry is None:
                raise UsageError(f"{found}: neither `task:` nor `group:` names what it defines")
            registry = dict(_known()) if isinstance(found, str) or entry.kind == Sort.GROUP else {}
            made = _factory(data, found if isinstance(found, Path) else None).build(entry, registry=registry)
    except (UsageError, DataError):
        raise
    except Exception as error:
        kind = DataError if isinstance(error, OSError) else UsageError
        raise kind(f"{label}: the harness cannot make this task: {_line(error)}") from error
    tasks, groups = _flat(made)
    for name, task in tasks.items():
        _require_plain(name, task)
    first = next(iter(tasks.values()))
    metadata = first.config.metadata if isinstance(first.config.metadata, dict) else {}
    bare = made.task_name if len(tasks) == 1 and not groups else entry.name
    own = f"{PREFIX}{bare}" if any(bare == each.name for each in OWN) else bare
    return Prepared(
        name=own,
        title=str(metadata.get("title") or own),
        group=str(metadata.get("group") or "other tasks"),
        metric=None,
        kind=None,
        chance=None,
        tasks=tasks,
        parts=dict.fromkeys(tasks, "") if len(tasks) == 1 else {name: name.removeprefix(f"{bare}_") for name in tasks},
        groups=groups,
        sizes={name: len(task.eval_docs) for name, task in tasks.items()},
    )


def _flat(made: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    from lm_eval.api.group import Group

    if isinstance(made, Group):
        groups = {made.name: made, **{group.name: group for group in made.get_all_groups()}}
        return {task.task_name: task for task in made.get_all_tasks()}, groups
    several = made if isinstance(made, list) else [made]
    return {task.task_name: task for task in several}, {}


def _require_inert(name: str, config: Mapping[str, Any]) -> None:
    if config.get("unsafe_code"):
        raise UsageError(f"{name} runs code that the model writes, which tersely does not do; choose another task")
    if "class" in config or "custom_dataset" in config:
        raise UsageError(
            f"{name} fetches its data by code of its own; write a task file that reads your copy of them "
            "(docs/tasks.md), and give its path"
        )


def _require_plain(name: str, task: Any) -> None:
    _require_inert(name, {"unsafe_code": getattr(task, "UNSAFE_CODE", False)})
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"{name} shows pictures or sounds; only tasks of text can be asked here")


def _factory(data: Path | None, file: Path | None) -> Any:
    """The harness's own maker of tasks, with data that are at hand instead of downloads."""
    from lm_eval.api import metrics  # noqa: F401  (it fills the registry)
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks._factory import TaskFactory

    class Factory(TaskFactory):  # type: ignore[misc]
        def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
            if file is None:  # before any code of the task is loaded, which may fetch things at once
                _require_inert(entry.name, entry.cfg or {})
            config: dict[str, Any] = super()._load_full_config(entry, overrides)
            if isinstance(config.get("task"), list) or "class" in config or "custom_dataset" in config:
                return config
            for metric in config.get("metric_list") or ():
                name = metric.get("metric")
                outside = metric.get("hf_evaluate") or (isinstance(name, str) and name not in metric_registry)
                if outside and not config.get("process_results"):
                    raise UsageError(f"{entry.name} needs the metric {name!r}, which the harness would download")
            given = config.pop("dataset_kwargs", None) or {}
            path, part = config.get("dataset_path"), config.get("dataset_name")
            if path is None:
                raise UsageError(f"{entry.name} names no data (dataset_path); see docs/tasks.md for the form")
            config["custom_dataset"] = _loader(entry.name, str(path), part, given, data, file)
            return config

    return Factory()


def _loader(
    task: str, path: str, part: str | None, given: Mapping[str, Any], data: Path | None, file: Path | None
) -> Callable[..., Any]:
    """Loads a dataset that the harness knows by a path: from files, a folder, or what was loaded once."""

    def load(**_metadata: Any) -> Any:
        from datasets import Dataset, DatasetDict, load_dataset
        from datasets.packaged_modules.cache.cache import Cache

        near = [place for place in (None if file is None else file.parent, data) if place is not None]
        settings = {key: value for key, value in given.items() if key not in ("trust_remote_code", "data_files")}
        if path in _READERS:
            files = _files(task, given.get("data_files"), near)
            read = getattr(Dataset, _READERS[path])
            with TemporaryDirectory() as cache:
                return DatasetDict(
                    {
                        split: read(names, cache_dir=cache, keep_in_memory=True, **settings)
                        for split, names in files.items()
                    }
                )
        folder = next((place / path for place in near if (place / path).is_dir()), None)
        try:
            if folder is not None:
                alone = part is not None and not (folder / "README.md").is_file() and (folder / part).is_dir()
                chosen: dict[str, Any] = {"data_dir": part} if alone else {"name": part}
                with TemporaryDirectory() as cache:
                    return load_dataset(str(folder), cache_dir=cache, keep_in_memory=True, **chosen, **given)
            kept = Cache(
                repo_id=path, dataset_name=path.rpartition("/")[2], config_name=part, version="auto", hash="auto"
            )
            return kept.as_dataset()
        except Exception as error:
            where = path if data is None else data / path
            raise DataError(
                f"{task}: its data, the dataset {path}{f' ({part})' if part else ''}, are not at hand: put a copy of "
                f"its files into {where}{' in your data folder (--data DIR)' if data is None else ''}, or load it once "
                f"with the datasets library where there is a network ({_line(error)})"
            ) from error

    return load


def _files(task: str, named: Any, near: list[Path]) -> dict[str, list[str]]:
    """Split -> paths of the data files that a task names, which may be given from the task file or the data folder."""
    splits = named if isinstance(named, Mapping) else {"train": named}
    files: dict[str, list[str]] = {}
    for split, names in splits.items():
        for name in names if isinstance(names, list) else [names]:
            places = [place / str(name) for place in (*near, Path())]
            found = next((place for place in places if place.is_file()), None)
            if name is None or found is None:
                raise DataError(
                    f"{task}: its data file {name!r} is not there; it is looked for beside the task file, in the data "
                    "folder (--data DIR) and in the current folder"
                )
            files.setdefault(str(split), []).append(str(found))
    return files


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
