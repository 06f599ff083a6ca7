"""The frames that stores keep, environments draw and models see."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SIZE = 64
"""Pixels of a frame's side."""
FRAME = (SIZE, SIZE, 3)
FRAME_BYTES = SIZE * SIZE * 3

Frames = npt.NDArray[np.uint8]
"""Pictures (…, H, W, 3), RGB; those that stores keep and models see are of the shape `FRAME`."""
