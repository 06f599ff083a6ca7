"""The flow of stage ssv2: a video archive becomes a store of frame pairs. `python -m flows.ssv2`."""

from __future__ import annotations

import argparse
import collections
import errno
import hashlib
import itertools
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from tqdm import tqdm

from flows import runtime
from prelar import files
from prelar.config import load_config
from prelar.data import download, ingest
from prelar.data.archive import Member
from prelar.data.ingest import Ingested, Source
from prelar.data.labels import Labels, read_labels
from prelar.data.store import Store, StoreWriter, index_path
from prelar.data.video import Decoder
from prelar.errors import UserError

NAME = "ssv2"
TARGET = Path(f"data/{NAME}.zarr")


class Desk:
    """Batches on their way to the tasks and back, so that Prefect handles numbers and keeps no frames."""

    def __init__(self, decoder: Decoder, known: Labels, min_frames: int) -> None:
        self._decoder = decoder
        self._known = known
        self._min_frames = min_frames
        self._lock = threading.Lock()
        self._waiting: dict[int, list[Member]] = {}
        self._done: dict[int, list[Ingested]] = {}

    def put(self, number: int, batch: list[Member]) -> None:
        """Lay down a batch to be decoded."""
        with self._lock:
            self._waiting[number] = batch

    def decode(self, number: int) -> None:
        """Decode a batch that was laid down; a second attempt finds it still there."""
        with self._lock:
            batch = self._waiting[number]
        done = ingest.ingest(self._decoder, batch, self._known, self._min_frames)
        with self._lock:
            self._done[number] = done
            del self._waiting[number]

    def take(self, number: int) -> list[Ingested]:
        """Take away a batch that was decoded."""
        with self._lock:
            return self._done.pop(number)


_desks: dict[str, Desk] = {}


@task(name="fetch", cache_policy=NO_CACHE)
def fetch(urls: list[str]) -> list[Path]:
    """Download the archive's parts, or find them downloaded."""
    folder = files.STAGING / f"{NAME}-parts-{hashlib.sha256(chr(10).join(urls).encode()).hexdigest()[:16]}"
    with tqdm(desc="download", unit="B", unit_scale=True, disable=None) as bar:
        headers = download.environment_headers()
        return download.fetch(urls, folder / "parts", headers=headers, progress=bar.update)


@task(name="decode", task_run_name="decode-{number}", cache_policy=NO_CACHE, retries=1)
def decode(desk: str, number: int) -> int:
    """Decode one batch of clips."""
    _desks[desk].decode(number)
    return number


@task(name="validate", cache_policy=NO_CACHE)
def validate(path: Path, labels: Path, min_frames: int, max_bad: float) -> str:
    """Validate the staged store against its labels; returns the summary in a line."""
    from prelar.data import validation

    store, known = Store.open(path), read_labels(labels)
    splits = {identity: label.split for identity, label in known.clips.items()}
    suites = validation.store_suites(store, min_frames=min_frames, max_bad=max_bad)
    suites.append(validation.labels_suite(store, splits, known.names))
    counted: dict[str, Any] = validation.validate(NAME, suites, validation.facts(store))["facts"]
    return (
        f"{counted['clips']} clips, {counted['clips_of_25']} of them of 25 frames or more; "
        f"{counted['frames']} frames, {counted['pairs']} pairs, {counted['bad']} bad clips"
    )


@flow(name=NAME)
def ssv2() -> str:
    """Fetch, read as a stream, decode, store, index, validate and publish; returns a summary in a line.

    The caller holds the lock on the store. Work that an earlier run left in staging is continued.
    """
    cfg = load_config()
    settings = cfg.ssv2
    clear(files.STAGING.glob(f"{NAME}-*.old"), TARGET.parent.glob(f".{NAME}.*.old"))
    decoder = Decoder(settings.ffmpeg)
    source = find(settings.source, settings.labels)
    known = read_labels(source.labels)
    staging = (
        files.STAGING / f"{NAME}-{ingest.staging_key(source, known, decoder.version, settings.min_frames)}"
    )
    valid = staging / "valid"
    if not valid.is_file():
        with StoreWriter(staging / TARGET.name) as writer:
            fill(writer, source, Desk(decoder, known, settings.min_frames), settings.batch, settings.workers)
            ingest.append_missing(writer, known)
            writer.finish(ingest.attributes(writer, decoder.version, settings.min_frames))
        summary = validate(staging / TARGET.name, source.labels, settings.min_frames, settings.max_bad)
        files.write_text(valid, summary)
    summary = valid.read_text(encoding="utf-8")
    publish(staging)
    return summary


def find(source: str | list[str], labels: str | None) -> Source:
    """The source that params.yaml names; a list of URLs is downloaded first."""
    if isinstance(source, str):
        return ingest.folder_source(Path(source), Path(labels) if labels else None)
    wanted = [*source, labels] if labels and labels.startswith(("http://", "https://")) else source
    paths = fetch(wanted)
    named = paths[len(source)] if len(wanted) > len(source) else Path(labels) if labels else None
    return ingest.files_source(paths[: len(source)], named)


def fill(writer: StoreWriter, source: Source, desk: Desk, batch: int, workers: int) -> None:
    """Decode what the writer lacks, and append it in the source's order.

    No more batches than workers are under way or wait to be appended: so much a crash loses at most.
    """
    _desks[NAME] = desk
    total = source.size or len(source.clips)
    flight: collections.deque[tuple[int, PrefectFuture[int]]] = collections.deque()
    with tqdm(
        desc="ingest", total=total, unit="B" if source.size else "clip", unit_scale=True, disable=None
    ) as bar:
        members = ingest.after_committed(source.members(bar.update), writer)
        for number, some in enumerate(ingest.batches(members, batch)):
            if len(flight) == workers:
                _land(writer, desk, flight, bar)
            desk.put(number, some)
            flight.append((number, decode.submit(NAME, number)))
        while flight:
            _land(writer, desk, flight, bar)


def _land(
    writer: StoreWriter, desk: Desk, flight: collections.deque[tuple[int, PrefectFuture[int]]], bar: tqdm
) -> None:
    number, future = flight.popleft()
    future.result()
    done = desk.take(number)
    ingest.append(writer, done)
    bar.set_postfix(clips=writer.count, frames=writer.frames, refresh=False)


def publish(staging: Path) -> None:
    """Rename the validated store and its index to their final names, and clear all staging but downloads.

    A run that is killed in between leaves the rest to the next one.
    """
    staged = staging / TARGET.name
    for path, final in ((index_path(staged), index_path(TARGET)), (staged, TARGET)):
        if path.exists():
            files.publish(path, final)
    left = [path for path in files.STAGING.glob(f"{NAME}-*") if not path.name.startswith(f"{NAME}-parts-")]
    aside = [path.with_name(f"{path.name}.old") for path in left]
    for path, other in zip(left, aside, strict=True):
        path.replace(other)
    clear(aside)


def clear(*paths: Iterable[Path]) -> None:
    """Remove what is no longer needed."""
    for path in itertools.chain(*paths):
        files.remove(path)


def _arguments() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.ssv2", description=__doc__)
    parser.epilog = "What it does is set in params.yaml, group ssv2."
    parser.parse_args()


def main() -> None:
    """Run the flow with the settings of params.yaml."""
    _arguments()
    cfg = load_config()
    with files.exclusive(TARGET), runtime.server():
        pool: Any = ThreadPoolTaskRunner(max_workers=cfg.ssv2.workers)
        try:
            print(f"{TARGET}: {ssv2.with_options(task_runner=pool)()}")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError("the disk is full; make room and run again, the work so far is kept") from None


if __name__ == "__main__":
    runtime.run(main)
