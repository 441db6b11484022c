"""Names -> tasks of the evaluation harness: tersely's own, a user's task file, or one that the harness has.

The harness (lm-eval) is an extra, and is imported only when a task is made. Nothing here reaches for the network: the
data of the harness's own tasks are taken from the data folder, or from what the datasets library has kept.
"""

from __future__ import annotations

import difflib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tersely.errors import DataError, UsageError, first_line
from tersely.evaluation.tasks.catalog import OWN, Own
from tersely.evaluation.tasks.items import Tokens
from tersely.evaluation.tasks.local_data import loader
from tersely.evaluation.tasks.scores import Kind
from tersely.evaluation.tasks.task_objects import make_task_objects

PREFIX = "harness:"
"""Before a name: the harness's own task, where tersely has one of the same name."""
_MOST_NAMES = 5


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
    with silence():
        tasks, names, groups = make_task_objects(own, parts)
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
        raise kind(f"{label}: the harness cannot make this task: {first_line(error)}") from error
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
            config["custom_dataset"] = loader(entry.name, str(path), part, given, data, file)
            return config

    return Factory()
