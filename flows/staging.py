"""How a flow's store grows in staging and comes to its final name, whole or not at all."""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from tqdm import tqdm

from flows import runtime
from prelar.store import remote
from prelar.store.schema import checks_path, index_path
from prelar.store.store import Store
from prelar.utils import files
from prelar.utils.errors import UserError

if TYPE_CHECKING:
    from prelar.validation.suites import Suite

LOCAL = "data"
Facts = dict[str, Any]


class Parcel:
    """What a task is given or returns, closed to Prefect, which would look through every list for futures."""

    def __init__(self, content: Any) -> None:
        """`content` is whatever pickle takes."""
        self.content = content

    def open(self) -> Any:
        """Take the content out; the parcel, which Prefect may keep, is empty afterwards."""
        content, self.content = self.content, None
        return content


class Future(Protocol):
    """A task that was submitted, and that returns a parcel."""

    def result(self) -> Any:
        """Wait for the task; raises what it raised."""


def in_order(batches: Iterable[Any], submit: Callable[[int, Parcel], Future], ahead: int) -> Iterator[Any]:
    """Results in the order of the batches, of which at most `ahead` are under way or wait."""
    flight: collections.deque[Future] = collections.deque()
    for number, batch in enumerate(batches):
        if len(flight) == ahead:
            yield flight.popleft().result().open()
        flight.append(submit(number, Parcel(batch)))
    while flight:
        yield flight.popleft().result().open()


def named_store(about: str | None, kind: str) -> str:
    """The name of the store that a flow's command line asks for: that of its kind, or of a further source."""
    parser = argparse.ArgumentParser(prog=f"python -m flows.{kind}", description=about)
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        default=kind,
        help=f"store to make: {kind} (default), or a name under sources in params.yaml",
    )
    parser.epilog = (
        f"Its settings are the group {kind} of params.yaml, for NAME with the keys of sources.NAME."
    )
    name: str = parser.parse_args().name
    return name


def stage_of(name: str, kind: str) -> str:
    """The stage of dvc.yaml that makes a store."""
    return name if name == kind else f"source@{name}"


def target(name: str) -> Path:
    """Where the store `name` is published."""
    return Path(f"data/{name}.zarr")


@contextlib.contextmanager
def store_build(name: str, kind: str) -> Iterator[None]:
    """Hold the lock on a store, have a Prefect server, and report a full disk in one line.

    What is wrong with a key of a further source is told by that source's name.
    """
    with files.exclusive(target(name)), runtime.server():
        try:
            yield
        except UserError as error:
            told = str(error)
            if name == kind or not told.startswith(f"{kind}."):
                raise
            raise UserError(f"sources.{name}{told.removeprefix(kind)}") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError("the disk is full; make room and run again, the work so far is kept") from None


@task(name="validate", cache_policy=NO_CACHE)
def validate(name: str, path: Path, make_suites: Callable[[Store], Sequence[Suite]]) -> Facts:
    """Validate a staged store, show the result in Prefect, and return the store's facts.

    What was found goes to a file beside the store. Raises `UserError` with the reasons where a check fails.
    """
    from prelar.validation import suites

    store = Store.open(path)
    summary = suites.REPORTS / name / "summary.json"
    summary.unlink(missing_ok=True)
    try:
        counted: Facts = suites.validate(name, make_suites(store), suites.facts(store))["facts"]
    finally:
        if summary.is_file():
            _show(name, suites.as_markdown(json.loads(summary.read_text(encoding="utf-8"))))
    files.write_text(checks_path(path), summary.read_text(encoding="utf-8"))
    return counted


def _show(name: str, markdown: str) -> None:
    """Make the result of a validation an artifact; a server that does not take it spoils nothing."""
    if TaskRunContext.get() is not None:
        with contextlib.suppress(Exception):
            key = f"validation-{name.replace('_', '-')}"
            create_markdown_artifact(key=key, description=f"The store {name}", markdown=markdown)


def clear_leftovers(name: str) -> None:
    """Remove what runs that were killed while publishing left behind."""
    _clear(files.STAGING.glob(f"{name}-*.old"), files.leftovers(target(name).parent, name))


def publish(name: str, staging: Path, root: str = LOCAL, keep: tuple[str, ...] = ()) -> None:
    """Bring the validated store, its index and its checks to their final names; clear the flow's staging.

    Where `root` is elsewhere, the store is published there first, and a pointer to it takes the store's place
    in the project. Folders of staging whose names start with one of `keep` stay. What is staged keeps its
    names until all three are whole at their final ones, whoever removes those meanwhile: a run that is
    killed in between leaves everything to the next one. Raises `UserError` where the published store cannot
    be opened.
    """
    staged = staging / target(name).name
    twin = staging / "publish" / staged.name
    for part in (index_path, checks_path):
        files.link(part(staged), part(twin))
    if root == LOCAL:
        files.link(staged, twin)
    else:
        files.remove(twin)
        remote.write_pointer(twin, _upload(root, staged))
    for part in (index_path, checks_path, Path):
        files.publish(part(twin), part(target(name)))
    Store.open(target(name))
    left = [path for path in files.STAGING.glob(f"{name}-*") if not path.name.startswith(keep)]
    aside = [path.with_name(f"{path.name}.old") for path in left]
    for path, other in zip(left, aside, strict=True):
        path.replace(other)
    _clear(aside)


def _upload(root: str, staged: Path) -> dict[str, Any]:
    """Publish a staged store below `root`; returns the pointer to it."""
    size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
    with tqdm(desc="publish", total=size, unit="B", unit_scale=True, disable=None) as bar:
        return remote.publish(root, staged, index_path(staged), bar.update)


def _clear(*paths: Iterable[Path]) -> None:
    for path in itertools.chain(*paths):
        files.remove(path)
