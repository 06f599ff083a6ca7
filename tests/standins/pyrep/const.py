"""Constants of PyRep."""

from enum import Enum


class RenderMode(Enum):
    """How a vision sensor draws."""

    OPENGL = 0
    OPENGL_AUXILIARY = 1
    OPENGL_COLOR_CODED = 2
    POV_RAY = 3
    EXTERNAL = 5
    EXTERNAL_WINDOWED = 6
    OPENGL3 = 7
    OPENGL3_WINDOWED = 8
