"""Mixtures and unions: several stores become one of a name of its own, which is validated as one.

DVC cannot read the sources of a mixture from params.yaml, so for each of them a stage of dvc.yaml writes
which store it is to `data/members/<mixture>/<source>.json`; what joins them depends on that folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from prelar.config import Config
from prelar.store.joined import join
from prelar.store.schema import checks_path
from prelar.store.store import Member, Store
from prelar.utils import files
from prelar.utils.errors import UserError, printable
from prelar.validation import suites

NOTES = Path("data/members")


def run(config: Config, name: str, source: str | None = None) -> None:
    """Join the stores of a mixture or a union; with a source of a mixture, write which store that is.

    Raises `UserError` where the name is unknown, a store is missing, or what is joined is not valid.
    """
    if name not in config.mixtures and name not in config.unions:
        known = ", ".join([*config.mixtures, *config.unions]) or "none so far"
        raise UserError(
            f"{printable(name, 100)}: neither a mixture nor a union of params.yaml, which has {known}"
        )
    if source is not None:
        store = Store.open(Path(f"data/{source}.zarr"))
        note = {"store": str(store.path), "digest": store.digest()}
        files.write_text(NOTES / name / f"{source}.json", json.dumps(note) + "\n")
        return
    path = Path(f"data/{name}.zarr")
    files.remove(checks_path(path))
    files.remove(path)
    parts: list[tuple[str, str, float | None]]  # name, place and weight of each store
    if name in config.mixtures:
        parts = [(part, f"{part}.zarr", weight) for part, weight in config.mixtures[name].items()]
    else:
        parts = [(str(number), place, None) for number, place in enumerate(config.unions[name])]
    members = [
        Member(part, Store.open(place if "://" in place else path.parent / place), weight)
        for part, place, weight in parts
    ]
    store = join(path, members, [place for _, place, _ in parts])
    try:
        checked = [*suites.store_suites(store, min_frames=1, max_bad=None), suites.members_suite(store)]
        summary = suites.validate(name, checked, suites.facts(store))
    except UserError:
        files.remove(path)
        raise
    files.write_text(checks_path(path), json.dumps(summary, indent=2))
    counted = summary["facts"]
    print(f"{path}: {len(members)} stores, {counted['clips']} clips, {counted['frames']} frames", flush=True)
