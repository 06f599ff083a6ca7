"""What goes wrong."""

from rlbench.backend.task import Task


class DemoError(Exception):
    """A demo failed."""

    def __init__(self, message: str, task: Task) -> None:
        super().__init__(f"Error in task {task.get_name()}. {message}")


class TaskEnvironmentError(Exception):
    """A task cannot be used so."""
