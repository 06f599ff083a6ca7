"""What the page may show of a value."""

from __future__ import annotations

from typing import Any

import pytest

from prelar.report.provenance import redact


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://me:hush@host.org/a/b?token=hush#hush", "https://host.org/a/b"),
        ("HTTP:/hush.org/a", "http:///hush.org/a"),
        ("https://host.org:hush/a", "…"),
        ("file:///home/me/parts", "…/parts"),
        ("/home/me/parts/", "…/parts"),
        ("~/parts", "…/parts"),
        ("data/sample", "data/sample"),
        ("prelar", "prelar"),
        (["/a/b", 3], ["…/b", 3]),
        (None, None),
        (0.5, 0.5),
    ],
)
def test_values_lose_what_is_private(value: Any, shown: Any) -> None:
    assert redact(value) == shown
