"""Tasks: what a model can, asked through EleutherAI's evaluation harness, offline and of data at hand."""

from pathlib import Path

from tersely.evaluation.tasks.catalog import OWN
from tersely.evaluation.tasks.running import check_tasks, run_tasks
from tersely.evaluation.tasks.scores import Kind, TaskInfo, TaskScores

__all__ = ["Kind", "TaskInfo", "TaskScores", "check_tasks", "run_tasks", "task_names"]


def task_names(data: Path | None) -> tuple[TaskInfo, ...]:
    """The tasks that come with tersely, and which of them have their data in this folder.

    Data that are in their place but cannot be read count as not found.
    """
    return tuple(own.info(data) for own in OWN)
