"""A store with as many clips and frames as Something-Something V2, whose frames are holes in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prelar.store import schema, writer

CLIPS = 220_847
LABELS = 174


def build(path: Path) -> int:
    """Make the store and its index; returns how many frames it claims, about 9.8 million."""
    lengths = np.random.default_rng(0).integers(8, 82, CLIPS)
    starts, total = np.cumsum(lengths) - lengths, int(lengths.sum())
    rows = (
        {"id": str(n), "split": "train" if n % 4 < 3 else "validation", "label": f"label {n % LABELS}",
         "label_id": n % LABELS, "frames": length, "start": start, "width": 427, "height": 240, "fps": 12.0,
         "sha256": f"{n:064x}", "status": "ok"}
        for n, (length, start) in enumerate(zip(lengths.tolist(), starts.tolist(), strict=True))
    )  # fmt: skip
    digest = writer.write_index(schema.index_path(path), rows)
    for name, layout, values in (
        ("clip_start", schema.CLIPS, starts),
        ("clip_length", schema.CLIPS, lengths),
        ("pairs", schema.PAIRS, schema.pair_index(starts, lengths)),
    ):
        column = writer._Column(path / name, layout)
        column.append(values)
        column.finish()
    layout = schema.FRAMES
    writer._write_json(path / "frames/zarr.json", layout.metadata(total))
    for number in range(-(-total // layout.shard)):
        shard = layout.file(path / "frames", number)
        shard.parent.mkdir(parents=True)
        held = min(layout.shard, total - number * layout.shard)
        with shard.open("wb") as handle:
            handle.seek(layout.shard_bytes(held) - layout.tail_bytes)
            handle.write(layout.tail(held))
    writer._write_json(path / "zarr.json", {"attributes": {"schema": schema.SCHEMA, "index_sha256": digest}})
    return total
