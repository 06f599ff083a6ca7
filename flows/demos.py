"""The flow of stage demos: makes a store with actions from demonstrations. `python -m flows.demos [NAME]`."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner
from tqdm import tqdm

from flows import dvc, runtime, staging
from flows.staging import Future, Parcel
from prelar.config import Config, Demos, load_config
from prelar.demos.episodes import Episode, Job, Source, Splits, clips, staging_key
from prelar.demos.rlbench_live import RlbenchLive
from prelar.demos.sources import open_source
from prelar.envs.names import checked_config
from prelar.store.schema import index_path
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils import files
from prelar.utils.errors import UserError, printable
from prelar.utils.processes import worker_pool

if TYPE_CHECKING:
    from prelar.validation.suites import Suite

NAME = "demos"
FORMER = "rlbench"
"""What the store was called before."""
BATCH = 4
SHOWN = 100
Later = Callable[[], Episode]


class CollectionPlan(NamedTuple):
    """What a run has to do, and where it is staged."""

    source: Source
    jobs: list[Job]
    folder: Path
    name: str = NAME

    @property
    def store(self) -> Path:
        """The staged store."""
        return self.folder / f"{self.name}.zarr"

    @property
    def built(self) -> Path:
        """There once the store is whole."""
        return self.folder / "built"


@task(name="collect", task_run_name="collect-{number}", cache_policy=NO_CACHE)
def collect(number: int, running: Parcel) -> Parcel:
    """Wait for one batch of episodes."""
    return Parcel([wait() for wait in running.open()])


@flow(name=NAME)
def demos(name: str = NAME) -> str:
    """Collect, store, index, validate and publish demonstrations. Returns a one-line summary with the rate.

    The caller holds the lock on the store. The unfinished work of an earlier run is continued.

    Args:
        name: The store, named like its source in params.yaml.
    """
    config = load_config()
    settings = settings_of(config, name)
    staging.clear_leftovers(name)
    plan = planned(settings, name)
    source, rate = plan.source, ""
    if not plan.built.is_file() and not (name == NAME and settings.fps is None and adopted(plan)):
        with StoreWriter(plan.store, arrays=source.arrays) as writer:
            begin = time.monotonic()
            count = fill(writer, source, plan.jobs, settings.workers, settings.fps)
            seconds = time.monotonic() - begin
            rate = f"; {count} episodes stored in {seconds:.0f} s, {60 * count / seconds:.1f} a minute"
            writer.finish(source.attributes())
        files.write_text(plan.built, "")
    checks = functools.partial(suites, source=source, max_bad=settings.max_bad)
    counted = staging.validate(name, plan.store, checks)
    staging.publish(name, plan.folder, config.data_root)
    several = "s" if len(source.cameras) > 1 else ""
    return (
        f"{counted['clips']} clips of {len(source.cameras)} camera{several}, {counted['frames']} frames, "
        f"{counted['pairs']} pairs, {counted['bad']} clips left out{rate}"
        + (f"; {counted['repeats']}" if "repeats" in counted else "")
    )


def settings_of(config: Config, name: str) -> Demos:
    """The settings of the store `name`. Raises `UserError` where params.yaml has no such demonstrations."""
    settings = config.source(name)
    if not isinstance(settings, Demos):
        raise UserError(f"{name}: no source of demonstrations; run `python -m flows.ssv2 {name}`")
    return settings


def planned(settings: Demos, name: str = NAME) -> CollectionPlan:
    """What params.yaml asks for. Raises `UserError` where that is impossible."""
    source = open_source(settings)
    jobs = source.jobs()
    folder = files.STAGING / f"{name}-{staging_key(source, jobs, settings.fps)}"
    return CollectionPlan(source, jobs, folder, name)


def adopted(plan: CollectionPlan) -> bool:
    """Whether the plan's store is one made before, under the former name; a line says so, or why not.

    Live demos differ from run to run, so a former store of the same source, settings and episodes, in a local
    folder, is staged as it is. Other sources give the same store again.
    """
    former = staging.target(FORMER)
    if not former.exists():
        return False
    clips = [
        (job.task, job.variation, job.episode, camera) for job in plan.jobs for camera in plan.source.cameras
    ]
    try:
        store = Store.open(former)
        attrs = {key: store.attrs.get(key) for key in plan.source.attributes()}
        rows = store.index.select(["task", "variation", "episode", "camera"]).to_pylist()
        same = attrs == plan.source.attributes() and [tuple(row.values()) for row in rows] == clips
    except UserError:
        same = False
    local = (former / "zarr.json").is_file()
    if not (same and local and isinstance(plan.source, RlbenchLive)):
        print(
            f"{former}, a store by the former name of {staging.target(NAME)}, is not used; you may remove it"
        )
        return False
    files.link(index_path(former), index_path(plan.store))
    files.link(former, plan.store)
    files.write_text(plan.built, "")
    print(f"{former} holds these demos and becomes {staging.target(NAME)}; you may remove the former")
    return True


def suites(store: Store, source: Source, max_bad: float) -> list[Suite]:
    """What must hold of the store of a source's demonstrations."""
    from prelar.validation.demonstrations import demonstration_suites

    return demonstration_suites(store, source, max_bad=max_bad)


def fill(writer: StoreWriter, source: Source, jobs: list[Job], workers: int, fps: float | None = None) -> int:
    """Collect the episodes that the writer lacks, in worker processes, and append them in the jobs' order.

    `fps` is told of them in place of the source's rate, if given. Returns how many of them were stored; one
    with a fault has only its row in the index.
    """
    done = writer.count // len(source.cameras)
    labels = {name: number for number, name in enumerate(sorted({job.task for job in jobs}))}
    splits = Splits(jobs, writer.rows())
    total, stored = collections.Counter(job.task for job in jobs), collections.Counter[str]()
    sound = 0
    with (
        episode_workers(source, jobs[done:], workers, writer.path.parent / "demos") as (collect_job, discard),
        tqdm(desc="demonstrations", total=len(jobs), initial=done, unit="episode", disable=None) as bar,
    ):
        stored.update(job.task for job in jobs[:done])
        for episodes in collected(jobs[done:], collect_job, workers):
            for episode in episodes:
                label = labels[episode.job.task]
                for frames, row, arrays in clips(episode, source, label, splits, fps):
                    writer.append(frames, row, **arrays)
                sound += row["reason"] is None
                stored[task := episode.job.task] += 1
                bar.set_postfix_str(f"{printable(task)} {stored[task]}/{total[task]}", refresh=False)
            writer.commit()
            bar.update(len(episodes))
            for episode in episodes:
                discard(episode.job)
    return sound


@contextlib.contextmanager
def episode_workers(
    source: Source, jobs: list[Job], workers: int, folder: Path
) -> Iterator[tuple[Callable[[Job], Later], Callable[[Job], None]]]:
    """Worker processes, one thread, or simulators that use `folder`: what starts and what ends a job."""
    if isinstance(source, RlbenchLive):
        with source.pool(jobs, workers, folder) as simulators:
            yield lambda job: functools.partial(simulators.result, job), simulators.discard
    elif getattr(source, "in_turn", False):
        thread = ThreadPoolExecutor(1)
        with contextlib.closing(source):  # type: ignore[type-var]
            try:
                yield lambda job: thread.submit(source.collect, job).result, lambda job: None
            finally:
                thread.shutdown(cancel_futures=True)
    else:
        with worker_pool(workers) as pool:
            yield lambda job: pool.submit(source.collect, job).result, lambda job: None


def collected(jobs: list[Job], start: Callable[[Job], Later], workers: int) -> Iterator[list[Episode]]:
    """Batches of collected episodes in the order of the jobs, which are started in that order."""

    def submit(number: int, batch: Parcel) -> Future:
        return collect.submit(number, Parcel([start(job) for job in batch.content]))

    batches = (jobs[begin : begin + BATCH] for begin in range(0, len(jobs), BATCH))
    try:
        yield from staging.in_order(batches, submit, workers)
    except BrokenProcessPool:
        raise UserError("a worker process died; run again, the work so far is kept") from None


def account(store: Store) -> list[str]:
    """What could not be collected and why, a line for each task and reason."""
    bad = collections.Counter(
        (row["task"], row["variation"], row["reason"])
        for row in store.index.select(["task", "variation", "status", "reason"]).to_pylist()
        if row["status"] == "bad"
    )
    return [
        printable(f"  {task}, variation {variation}: {count} clips: {why}")
        for (task, variation, why), count in bad.items()
    ]


def main() -> None:
    """Run the flow with the settings of params.yaml."""
    name = staging.named_store(__doc__, NAME)
    config, stage = checked_config(), staging.stage_of(name, NAME)
    settings, begun = settings_of(config, name), dvc.stamps(stage, config)
    with staging.store_build(name, NAME):
        pool: Any = ThreadPoolTaskRunner(max_workers=settings.workers)
        print(f"{staging.target(name)}: {demos.with_options(task_runner=pool)(name)}")
        dvc.record(stage, begun)
        left_out = account(Store.open(staging.target(name)))
        if left_out:
            print("\n".join(["left out:", *left_out[:SHOWN], *(["  …"] if left_out[SHOWN:] else [])]))


if __name__ == "__main__":
    runtime.run(main)
