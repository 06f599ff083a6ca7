"""Constants of PyRep."""

from enum import Enum


class RenderMode(Enum):
    """How a vision sensor draws."""

    OPENGL = 0
    OPENGL3 = 7
