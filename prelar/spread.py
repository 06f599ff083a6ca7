"""Which of many to show or look at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def evenly(count: int, limit: int) -> npt.NDArray[np.int64]:
    """At most `limit` of the numbers below `count`, evenly spread, in order: int64 (limit or fewer,).

    The first and the last are among them where there are two or more.
    """
    return np.linspace(0, count - 1, min(limit, count)).round().astype(np.int64)
