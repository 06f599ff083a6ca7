"""Task look-up."""

import importlib

from rlbench.backend.task import Task


def task_file_to_task_class(task_file: str) -> type[Task]:
    """The class in a task's file."""
    name = task_file.replace(".py", "")
    module = importlib.reload(importlib.import_module(f"rlbench.tasks.{name}"))
    found: type[Task] = getattr(module, "".join(word[0].upper() + word[1:] for word in name.split("_")))
    return found
