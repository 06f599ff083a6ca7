"""Several stores read as one: a union, whose clips count alike, or a mixture, whose members have weights.

In the place of arrays, the folder `data/<name>.zarr` of a joined store holds `members.json`, which names the
members in their order and knows each by its digest; `data/<name>.parquet` is their indexes, one after the
other. No frame is copied: the members stay where they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prelar.store.schema import index_path
from prelar.store.store import Member, Store
from prelar.store.writer import write_index
from prelar.utils import files
from prelar.utils.errors import UserError

SCHEMA = 1
MEMBERS = "members.json"
MEMBERS_BYTES, ROWS = 1 << 20, 10_000


def join(path: Path, members: Sequence[Member], places: Sequence[str]) -> Store:
    """Write the joined store `path` of members that lie at `places`, with its index, and open it.

    A place is a URL, an absolute folder, or a path from the folder of `path`. Either every member has a
    weight, then the joined store is a mixture, or none has, then it is a union.
    """
    digest = write_index(index_path(path), _rows(members))
    listed = [
        {"name": member.name, "store": place, "digest": member.store.digest(), "weight": member.weight}
        for member, place in zip(members, places, strict=True)
    ]
    content = {"schema": SCHEMA, "index_sha256": digest, "members": listed}
    files.write_text(path / MEMBERS, json.dumps(content, indent=2) + "\n")
    return Store.open(path)


def _rows(members: Sequence[Member]) -> Iterator[dict[str, Any]]:
    """The rows of the joined index: starts count on; a mixture's ids and cameras begin with the member."""
    begin = 0
    for member in members:
        for batch in member.store.index.to_batches(max_chunksize=ROWS):
            for row in batch.to_pylist():
                if row["start"] is not None:
                    row["start"] += begin
                named = {key: row[key] for key in ("id", "camera") if row[key] is not None}
                yield row | {key: f"{member.prefix}{value}" for key, value in named.items()}
        begin += member.store.num_frames


def open_members(path: Path) -> tuple[dict[str, Any], list[Member]] | None:
    """What a joined store's file says, and its members, opened; None where the folder is of no joined store.

    Raises `UserError` where the file is damaged, and where a member is missing or another than was joined.
    """
    file = path / MEMBERS
    if not file.is_file():
        return None
    try:
        told = files.parse_json(files.read_bytes(file, MEMBERS_BYTES))
    except ValueError as error:
        raise UserError(f"{file}: cannot be read ({error}); join the stores again") from None
    if not _is_sound(told):
        raise UserError(f"{file}: not what joins stores; join them again")
    members = []
    for about in told["members"]:
        place = about["store"]
        found = Store.open(place if "://" in place else Path(os.path.normpath(path.parent / place)))
        if found.digest() != about["digest"]:
            raise UserError(
                f"{path}: {found.path} is another store than the one that was joined; run `dvc repro`"
            )
        members.append(Member(about["name"], found, about["weight"]))
    return told, members


def _is_sound(told: object) -> bool:
    """Whether a value is what `join` writes."""
    if not isinstance(told, dict) or told.get("schema") is True or told.get("schema") != SCHEMA:
        return False
    members = told.get("members")
    if not isinstance(told.get("index_sha256"), str) or not isinstance(members, list) or not members:
        return False
    texts = ("name", "store", "digest")
    if not all(isinstance(m, dict) and all(isinstance(m.get(key), str) for key in texts) for m in members):
        return False
    weights = [member.get("weight") for member in members]
    return weights == [None] * len(weights) or all(
        type(weight) in (int, float) and 0 < weight < math.inf for weight in weights
    )
