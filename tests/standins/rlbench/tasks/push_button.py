"""A task of the stand-in."""

from rlbench.backend.task import Task


class PushButton(Task):
    """A task with 3 variation(s)."""

    variations = 3
