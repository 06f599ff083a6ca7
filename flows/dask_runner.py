"""Batches of clips on Dask workers, of this machine or of others.

A task carries the batch's files to the worker and its frames back, through Dask alone: no folder has to be
shared, but for the videos of a folder of your own, which every worker must find under the same path. Prefect
stores neither. A worker has this project's environment and the same ffmpeg.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import staging
from prelar.config import Ssv2
from prelar.data import ingest
from prelar.data.archive import Member
from prelar.data.ingest import Ingested
from prelar.data.labels import Labels
from prelar.data.video import Decoder
from prelar.errors import UserError


class Parcel:
    """What a task carries, closed to Prefect, which would look through every list for futures."""

    def __init__(self, content: Any) -> None:
        """`content` is whatever pickle takes."""
        self.content = content

    def open(self) -> Any:
        """Take the content out; the parcel, which Prefect may keep, is empty afterwards."""
        content, self.content = self.content, None
        return content


@functools.cache
def _decoder(ffmpeg: str | None) -> Decoder:
    """The decoder of this worker, which goes on with a video where the last portion of it ended."""
    return Decoder(ffmpeg)


@task(name="decode", task_run_name="decode-{number}", cache_policy=NO_CACHE, retries=1)
def decode_parcel(
    number: int, parcel: Parcel, ffmpeg: str | None, version: str, known: Labels, min_frames: int
) -> Parcel:
    """Decode the portion in a parcel, on a Dask worker. Raises `UserError` where its ffmpeg is another."""
    decoder = _decoder(ffmpeg)
    if decoder.version != version:
        raise UserError(
            f"ffmpeg {decoder.version} on a Dask worker, {version} here; install the same, or set ssv2.ffmpeg"
        )
    return Parcel(ingest.ingest(decoder, parcel.content, known, min_frames))


def decoded(
    portions: Iterator[list[Member]], decoder: Decoder, known: Labels, settings: Ssv2
) -> Iterator[list[Ingested]]:
    """The portions' results in order."""

    def start(number: int, portion: list[Member]) -> Callable[[], list[Ingested]]:
        wanted = ingest.labels_of(known, portion)
        future: Any = decode_parcel.submit(
            number, Parcel(portion), settings.ffmpeg, decoder.version, wanted, settings.min_frames
        )

        def land() -> list[Ingested]:
            done: list[Ingested] = future.result().open()
            future.wrapped_future.release()
            return done

        return land

    return staging.in_order(portions, start, staging.PORTIONS * settings.workers)


def task_runner(address: str | None, workers: int) -> Any:
    """Prefect's task runner on the scheduler at `address`, or on a cluster of `workers` processes here."""
    from prefect_dask import DaskTaskRunner

    if address:
        return DaskTaskRunner(address=address)
    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    return DaskTaskRunner(cluster_kwargs=local)
