"""What the page says of a store, and the picture that it shows of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.compute as pc

from prelar.data.store import Store
from prelar.evaluation.panels import Frames, contact_sheet
from prelar.spread import evenly

SHEET = 32
EXAMPLES = 5


def describe(store: Store) -> dict[str, Any]:
    """Sizes, splits and attributes of a store, and what was left out of it and why."""
    bad = store.index.filter(pc.equal(store.index["status"], "bad"))
    reasons: dict[str, list[str]] = {}
    for row in bad.select(["id", "reason"]).to_pylist():
        reasons.setdefault(row["reason"], []).append(row["id"])
    counts = pc.value_counts(store.clip_index["split"]).to_pylist()
    return {
        "frames": store.num_frames,
        "clips": store.num_clips,
        "pairs": int((store.clip_length - 1).sum()),
        "labels": len(pc.unique(store.clip_index["label"])),
        "splits": {item["values"]: item["counts"] for item in sorted(counts, key=lambda i: str(i["values"]))},
        "bad": len(bad),
        "shortest": int(store.clip_length.min()),
        "longest": int(store.clip_length.max()),
        "median": float(np.median(store.clip_length)),
        "sheet": len(evenly(store.num_clips, SHEET)),
        "reasons": [
            {"reason": reason, "count": len(ids), "examples": ids[:EXAMPLES]}
            for reason, ids in sorted(reasons.items())
        ],
        "attributes": {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in store.attrs.items()
        },
    }


def overview(store: Store) -> Frames:
    """A contact sheet of the middle frames of at most `SHEET` clips, spread evenly over the store."""
    picks = evenly(store.num_clips, SHEET)
    middles = store.clip_start[picks] + store.clip_length[picks] // 2
    return contact_sheet(store.read_many(middles, 1)[:, 0])
