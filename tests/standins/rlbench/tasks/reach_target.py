"""A task of the stand-in."""

from rlbench.backend.task import Task


class ReachTarget(Task):
    """A task with 2 variation(s)."""

    variations = 2
