"""Numbers spread evenly: as many as asked for, ends included, gaps as equal as whole numbers allow."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prelar.utils.tables import evenly_spaced_indices


@given(count=st.integers(0, 5000), limit=st.integers(0, 300))
def test_spread_is_whole_and_even(count: int, limit: int) -> None:
    picked = evenly_spaced_indices(count, limit)
    assert len(picked) == min(count, limit)
    if len(picked) > 1:
        assert (picked[0], picked[-1]) == (0, count - 1)
        gaps = np.diff(picked)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_spread_of_ten_in_four() -> None:
    assert evenly_spaced_indices(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced_indices(10, 1).tolist() == [0] and evenly_spaced_indices(0, 4).tolist() == []
