"""The flow of stage ssv2: makes a store of frame pairs from videos. `python -m flows.ssv2 [NAME]`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from tqdm import tqdm

from flows import decoding, dvc, runtime, staging
from prelar.config import Config, Ssv2, load_config
from prelar.envs.names import checked_config
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils import disk, files, hub
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME_BYTES
from prelar.videos import download, ingest, lerobot
from prelar.videos.decode import Decoder
from prelar.videos.ingest import Source
from prelar.videos.labels import Labels, read_labels

if TYPE_CHECKING:
    from prelar.validation.suites import Suite

NAME = "ssv2"
PARTS = f"{NAME}-parts-"


@task(name="fetch", cache_policy=NO_CACHE)
def fetch(urls: list[str]) -> list[Path]:
    """Download the archive's parts, or find them downloaded."""
    folder = files.STAGING / f"{PARTS}{hashlib.sha256(chr(10).join(urls).encode()).hexdigest()[:16]}"
    with (  # stores of the same URLs share the folder
        files.exclusive(folder),
        tqdm(desc="download", unit="B", unit_scale=True, disable=None) as bar,
    ):
        headers = download.secrets(os.environ)
        return download.fetch(urls, folder / "parts", headers=headers, progress=bar.update)


@flow(name=NAME)
def ssv2(name: str = NAME) -> str:
    """Fetch, read as a stream, decode, store, index, validate and publish videos. Returns a one-line summary.

    The caller holds the lock on the store. The unfinished work of an earlier run is continued.

    Args:
        name: The store, named like its source in params.yaml.
    """
    config = load_config()
    settings = settings_of(config, name)
    staging.clear_leftovers(name)
    with contextlib.closing(Decoder(settings.ffmpeg, settings.workers)) as decoder:
        return build(config.data_root, name, settings, decoder)


def settings_of(config: Config, name: str) -> Ssv2:
    """The settings of the store `name`. Raises `UserError` where params.yaml has no such source of videos."""
    settings = config.source(name)
    if not isinstance(settings, Ssv2):
        raise UserError(f"{name}: no source of videos; run `python -m flows.demos {name}`")
    return settings


def build(root: str, name: str, settings: Ssv2, decoder: Decoder) -> str:
    """The flow's work, with a decoder that is closed when it ends in any way, so that no ffmpeg goes on."""
    source, known = find(settings, decoder)
    folder = (
        files.STAGING / f"{name}-{ingest.staging_key(source, known, decoder.version, settings.min_frames)}"
    )
    built = folder / "built"
    if not built.is_file():
        with StoreWriter(folder / f"{name}.zarr") as writer:
            needed = expected_bytes(source, known) - writer.frames * FRAME_BYTES
            disk.require(folder, needed, "the rest of the store")
            fill(writer, source, known, decoder, settings)
            ingest.append_missing(writer, known)
            kind = ingest.OWN if source.parts else ingest.NAME
            writer.finish(ingest.attributes(writer, decoder.version, settings.min_frames, kind))
        files.write_text(built, "")
    named = known if source.labels is not None else None
    checks = functools.partial(
        store_suites, known=named, min_frames=settings.min_frames, max_bad=settings.max_bad
    )
    counted = staging.validate(name, folder / f"{name}.zarr", checks)
    staging.publish(name, folder, root, keep=(PARTS,))
    return (
        f"{counted['clips']} clips, {counted['clips_of_25']} of them of 25 frames or more; "
        f"{counted['frames']} frames, {counted['pairs']} pairs, {counted['bad']} bad clips"
        + (f"; {counted['repeats']}" if "repeats" in counted else "")
    )


def store_suites(store: Store, known: Labels | None, min_frames: int, max_bad: float) -> list[Suite]:
    """What must hold of the store, and of its index against the labels if there are any."""
    from prelar.validation import suites

    found = suites.store_suites(store, min_frames=min_frames, max_bad=max_bad)
    if known is not None:
        splits = {identity: label.split for identity, label in known.clips.items()}
        found.append(suites.labels_suite(store, splits, known.names))
    return found


def find(settings: Ssv2, decoder: Decoder) -> tuple[Source, Labels]:
    """The source that params.yaml names, and what is known of its clips."""
    labels = Path(settings.labels) if settings.labels else None
    folder = hub.data_set(settings.source) if isinstance(settings.source, str) else None
    if folder and labels is None and lerobot.is_set(folder):
        parts, known = lerobot.plan(lerobot.open_set(folder, "ssv2.source"), settings.clip_seconds)
        return Source((), (), None, tuple(parts)), known
    own = ingest.own_videos(folder, labels) if folder else []
    if folder and own:
        with tqdm(desc="videos", total=len(own), unit="video", disable=None) as bar:
            return ingest.videos_source(
                folder, own, decoder, settings.clip_seconds, bar.update, settings.min_frames
            )
    source = find_archive(folder or settings.source, settings.labels)
    assert source.labels is not None
    return source, read_labels(source.labels)


def find_archive(source: Path | str | list[str], labels: str | None) -> Source:
    """Something-Something V2 where params.yaml says it is; a list of URLs is downloaded first."""
    if isinstance(source, str | Path):
        return ingest.folder_source(Path(source), Path(labels) if labels else None)
    wanted = [*source, labels] if labels and labels.startswith(("http://", "https://")) else source
    paths = fetch(wanted)
    named = paths[len(source)] if len(wanted) > len(source) else Path(labels) if labels else None
    return ingest.files_source(paths[: len(source)], named)


def expected_bytes(source: Source, known: Labels) -> int:
    """About how many bytes the frames of a source take, rather too few than too many."""
    if source.parts:
        return sum(member.part.frames for member in source.parts if member.part) * FRAME_BYTES
    clips = min(len(source.clips), len(known.clips)) if source.clips else len(known.clips)
    return disk.archive_bytes(clips, source.size or None)


def fill(writer: StoreWriter, source: Source, known: Labels, decoder: Decoder, settings: Ssv2) -> None:
    """Decode what the writer lacks, and append it in the source's order.

    No more batches than workers are under way or wait to be appended: so much a crash loses at most. Tasks
    take them in portions, so that a worker finds its next portion ready when it is done with one.
    """
    total, unit = (source.size, "B") if source.size else (len(source.clips or source.parts), "clip")
    with tqdm(desc="ingest", total=total, unit=unit, unit_scale=True, disable=None) as bar:
        members = ingest.after_committed(source.members(bar.update), writer)
        portions = ingest.batches(members, -(-settings.batch // decoding.PORTIONS))
        for done in decoding.decoded(portions, decoder, known, settings):
            ingest.append(writer, ingest.completed(decoder, done, known, settings.min_frames))
            bar.set_postfix(clips=writer.count, frames=writer.frames, refresh=False)


def main() -> None:
    """Run the flow with the settings of params.yaml."""
    name = staging.named_store(__doc__, NAME)
    config, stage = checked_config(), staging.stage_of(name, NAME)
    settings, begun = settings_of(config, name), dvc.stamps(stage, config)
    with staging.store_build(name, NAME):
        flow_run = ssv2.with_options(task_runner=decoding.task_runner(settings))
        print(f"{staging.target(name)}: {flow_run(name)}")
        dvc.record(stage, begun)


if __name__ == "__main__":
    runtime.run(main)
