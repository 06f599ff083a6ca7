"""The frames that stores keep, environments draw and models see."""

from __future__ import annotations

SIZE = 64
"""Pixels of a frame's side."""
FRAME = (SIZE, SIZE, 3)
FRAME_BYTES = SIZE * SIZE * 3
