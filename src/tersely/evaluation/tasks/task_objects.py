"""A task file of tersely's own and the items of its data -> task objects of the harness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tersely.evaluation.tasks.catalog import Own
from tersely.evaluation.tasks.items import Splits


def make_task_objects(own: Own, parts: Mapping[str, Splits]) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Task objects by their names, what each is called as a sub-task, and the group where there are several."""
    config = _task_file(own.name)
    tasks, names = {}, {}
    if own.kind == "auc":  # members and others together
        whole = [item for splits in parts.values() for item in splits["test"]]
        tasks[own.name] = _token_task()(config=_configured(config, own.name, {"test": whole}))
        names[own.name] = ""
    else:
        for part, splits in parts.items():
            name = f"{own.name}_{part.replace(' ', '_')}" if part else own.name
            tasks[name] = _configurable()(config=_configured(config, name, splits))
            names[name] = part
    return tasks, names, _grouped(own.name, tasks, config) if len(tasks) > 1 else {}


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
