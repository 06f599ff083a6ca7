"""A task of the stand-in."""

from rlbench.backend.task import Task


class OpenDrawer(Task):
    """A task with 1 variation(s)."""

    variations = 1
