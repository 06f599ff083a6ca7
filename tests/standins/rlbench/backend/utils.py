"""Task look-up."""

import importlib

from rlbench.backend.task import Task


def task_file_to_task_class(task_file: str) -> type[Task]:
    """The class in a task's file."""
    name = task_file.replace(".py", "")
    found: type[Task] = getattr(
        importlib.import_module(f"rlbench.tasks.{name}"), name.title().replace("_", "")
    )
    return found
