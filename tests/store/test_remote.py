"""Stores in object storage: whole with their manifest or refused, the same after a kill, read like others."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from prelar.store import remote, schema
from prelar.store.remote import MANIFEST, Objects, publish, write_pointer
from prelar.store.schema import Layout, index_path
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.train.sampler import SegmentSampler
from prelar.utils.errors import UserError
from tests.bucket import SECRET, bucket
from tests.conftest import ROOT

LENGTHS = [30, 64, 1, 100]


@pytest.fixture(scope="module")
def shelf() -> Iterator[str]:
    with bucket() as url:
        yield url


@pytest.fixture
def root(shelf: str, request: pytest.FixtureRequest) -> str:
    """A URL of the test's own in the bucket."""
    return f"{shelf}/{abs(hash(request.node.nodeid))}/"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose frames lie in several shards."""
    monkeypatch.setattr(schema, "FRAMES", Layout("uint8", (64, 64, 3), chunk=8, shard=64))
    with StoreWriter(tmp_path / "x.zarr", arrays={"actions": 2}) as writer:
        for number, length in enumerate(LENGTHS):
            random = np.random.default_rng(number)
            frames = random.integers(0, 256, (length, 64, 64, 3), dtype=np.uint8)
            actions = random.normal(size=(length, 2)).astype(np.float32)
            writer.append(frames, {"id": str(number), "split": "train"}, actions=actions)
        return writer.finish({"source": {}})


def sent(root: str, store: Store) -> str:
    """The URL of the store, published."""
    url: str = publish(root, store.path, index_path(Path(store.path)))["url"]
    return url


def same(one: Store, other: Store) -> None:
    assert one.index.equals(other.index) and one.attrs == other.attrs and one.shapes() == other.shapes()
    starts = [0, 55, 100, 170]
    assert np.array_equal(one.read_many(starts, 25), other.read_many(starts, 25))
    assert np.array_equal(one.array("actions"), other.array("actions"))
    assert np.array_equal(one.pairs, other.pairs)
    assert np.array_equal(one.clip_length, other.clip_length)


def test_a_store_in_a_bucket_reads_like_the_one_in_the_folder(
    root: str, store: Store, tmp_path: Path
) -> None:
    pointer = publish(root, store.path, index_path(store.path))
    same(Store.open(pointer["url"]), store)
    write_pointer(tmp_path / "p.zarr", pointer)
    far = Store.open(tmp_path / "p.zarr")
    same(far, store)
    for step in range(5):
        here, there = (SegmentSampler(s, length=7, batch=4, seed=0).at(step) for s in (store, far))
        assert all((here[name] == there[name]).all() for name in here)


def test_other_programs_read_it_from_the_bucket(root: str, store: Store) -> None:
    import pyarrow.parquet as pq
    import zarr

    url = sent(root, store)
    assert np.array_equal(zarr.open_group(f"{url}/x.zarr", mode="r")["frames"][50:90], store.read(50, 40))
    with fsspec.open(f"{url}/x.parquet") as handle:
        assert pq.read_table(handle).equals(store.index)


def test_every_read_is_a_few_ranges(root: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    far = Store.open(sent(root, store))
    asked: list[int] = []
    ranges = Objects.read_ranges

    def counted(self: Objects, wanted: list[tuple[str, int, int]]) -> list[bytes]:
        asked.append(sum(end - begin for _, begin, end in wanted))
        return ranges(self, wanted)

    monkeypatch.setattr(Objects, "read_ranges", counted)
    far.read_many([0, 60, 100], 8)
    assert asked == [3 * 8 * 64 * 64 * 3]


def test_the_same_store_has_one_place_and_is_not_sent_again(
    root: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sent(root, store)
    monkeypatch.setattr(Objects, "put", None)
    counted: list[int] = []
    again = publish(root, store.path, index_path(store.path), counted.append)
    assert again["url"] == first
    held = [path for path in store.path.rglob("*") if path.is_file()] + [index_path(store.path)]
    assert sum(counted) == sum(path.stat().st_size for path in held)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda fs, base: fs.rm_file(f"{base}/manifest.json"), "not whole"),
        (lambda fs, base: fs.rm(base, recursive=True), "not whole"),
        (lambda fs, base: fs.pipe_file(f"{base}/x.zarr/frames/c/1/0/0/0", b"x"), "has 1 bytes, expected"),
        (lambda fs, base: fs.rm_file(f"{base}/x.zarr/frames/c/1/0/0/0"), "is missing, expected"),
        (lambda fs, base: fs.pipe_file(f"{base}/manifest.json", b"{"), "not what it should be"),
        (lambda fs, base: fs.pipe_file(f"{base}/manifest.json", b'{"schema": 9}'), "schema 9, expected 1"),
        (lambda fs, base: flip(fs, f"{base}/x.parquet"), "differs from the manifest"),
        (lambda fs, base: flip(fs, f"{base}/x.zarr/zarr.json"), "differs from the manifest"),
    ],
)
def test_what_is_not_whole_is_refused_in_one_line(
    root: str, store: Store, damage: Callable[[fsspec.AbstractFileSystem, str], None], message: str
) -> None:
    url = sent(root, store)
    damage(fsspec.filesystem("s3"), url.removeprefix("s3://"))
    with pytest.raises(UserError, match=message) as told:
        Store.open(url)
    assert url in str(told.value) and "\n" not in str(told.value)


def flip(fs: fsspec.AbstractFileSystem, name: str) -> None:
    """Change an object, and leave its size."""
    content = fs.cat_file(name)
    fs.pipe_file(name, content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


def test_a_pointer_knows_its_store(root: str, store: Store, tmp_path: Path) -> None:
    pointer = publish(root, store.path, index_path(store.path))
    write_pointer(tmp_path / "p.zarr", pointer | {"manifest_sha256": "0" * 64})
    with pytest.raises(UserError, match="another store than the one published there"):
        Store.open(tmp_path / "p.zarr")


KILLED = """
import os, signal, sys
from pathlib import Path
from prelar.store.remote import Objects
from prelar.store.remote import publish

put, left = Objects.put, [int(sys.argv[3])]

def counted(self, name, path):
    put(self, name, path)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

Objects.put = counted
publish(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[2]).with_suffix(".parquet"))
"""


@pytest.mark.parametrize("killed_after", [6])
def test_killed_while_sending_it_is_no_store_and_the_next_run_ends_in_the_same_bytes(
    root: str, store: Store, killed_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", KILLED, root, str(store.path), str(killed_after)]
    killed = subprocess.run(command, cwd=ROOT, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    (begun,) = {name.split("/")[1] for name in Objects(root).sizes()}
    url = f"{root}x/{begun}"
    with pytest.raises(UserError, match="not whole"):
        Store.open(url)
    held = set(Objects(url).sizes())
    assert killed_after <= len(held) < len(list(store.path.rglob("*")))
    again: list[str] = []
    put = Objects.put

    def counted(self: Objects, name: str, path: Path) -> None:
        again.append(name)
        put(self, name, path)

    monkeypatch.setattr(Objects, "put", counted)
    assert sent(root, store) == url
    assert not held & set(again)
    same(Store.open(url), store)
    for name in Objects(url).sizes():
        if name != MANIFEST:
            assert Objects(url).read(name) == (store.path.parent / name).read_bytes()


def test_a_process_that_forked_reads_on(root: str, store: Store) -> None:
    far = Store.open(sent(root, store))
    assert np.array_equal(far.read(60, 10), store.read(60, 10))
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(far.read(60, 10), store.read(60, 10)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_an_absolute_folder_holds_stores_of_several_projects_without_a_copy(
    store: Store, tmp_path: Path
) -> None:
    pointer = publish(str(tmp_path / "shared"), store.path, index_path(store.path))
    write_pointer(tmp_path / "p.zarr", pointer)
    far = Store.open(tmp_path / "p.zarr")
    same(far, store)
    shard = Path(pointer["url"]) / "x.zarr/frames/c/0/0/0/0"
    assert shard.samefile(store.path / "frames/c/0/0/0/0")
    shard.unlink()
    with pytest.raises(UserError, match="is missing, expected"):
        Store.open(tmp_path / "p.zarr")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-shelf/here", "no-such-shelf"),
        ("nosuch://here", "cannot be used"),
    ],
)
def test_storage_that_cannot_be_had_is_told_in_one_line(
    shelf: str, store: Store, url: str, message: str
) -> None:
    for attempt in (lambda: Store.open(url), lambda: sent(url, store)):
        with pytest.raises(UserError, match=message) as told:
            attempt()
        assert url in str(told.value) and "\n" not in str(told.value)


def test_secrets_are_never_told(root: str, store: Store) -> None:
    """Another process, whose credentials are refused or missing, and which logs all it can."""
    script = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from prelar.store.store import Store; from prelar.utils.errors import run_main\n"
        "run_main(lambda: Store.open(sys.argv[1]))"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("AWS_SECRET")}
    for environment in (
        os.environ | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"},
        kept,
    ):
        command = [sys.executable, "-c", script, f"{root}x"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
        assert SECRET not in done.stdout + done.stderr
        assert "credentials in the environment" in done.stderr


def test_the_manifest_tells_every_object(root: str, store: Store) -> None:
    url = sent(root, store)
    manifest = json.loads(Objects(url).read(MANIFEST))
    held = Objects(url).sizes()
    assert manifest["schema"] == remote.SCHEMA
    assert set(manifest["objects"]) == set(held) - {MANIFEST}
    assert all(about["size"] == held[name] for name, about in manifest["objects"].items())


@pytest.mark.parametrize(
    "url",
    [
        "http://HOST/latest/meta-data",
        "zip://x::http://HOST/x.zip",
        "simplecache::s3://HOST/x",
        "file:///x::http://HOST/x",
        "webhdfs://HOST/x",
        "dask://HOST::file:///x",
        "s3://key:hush@HOST/x",
        "memory://x",
        "data:text/plain,x",
        "relative/folder",
        "file://relative/folder",
        "file://localhost/folder",
        "file://",
        "../..",
        "",
        "/\0",
    ],
)
def test_a_pointer_goes_to_no_other_kind_of_storage(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("asked for")

    monkeypatch.setattr(fsspec.core, "url_to_fs", never)
    write_pointer(tmp_path / "p.zarr", {"schema": 1, "url": url, "manifest_sha256": "0" * 64})
    with pytest.raises(UserError, match="cannot be used") as told:
        Store.open(tmp_path / "p.zarr")
    assert "hush" not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "content",
    [
        '{"schema": 1}',
        '{"schema": 1, "url": 5, "manifest_sha256": "0"}',
        '{"schema": 1, "url": "/x", "manifest_sha256": []}',
        '{"schema": true, "url": "/x", "manifest_sha256": "0"}',
        '{"schema": [1], "url": "/x", "manifest_sha256": "0"}',
        "[]",
        "1",
        "[" * 50_000,
        '{"schema": 1, "schema": 1}',
        " " * 100_000,
        "\ud800",
    ],
)
def test_a_pointer_that_is_none_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.zarr/pointer.json"
    path.parent.mkdir()
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"pointer\.json") as told:
        Store.open(path.parent)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.pop("store"),
        lambda told: told.update(store="../.."),
        lambda told: told.update(store=".."),
        lambda told: told.update(store=["x.zarr"]),
        lambda told: told.update(index="/etc/passwd"),
        lambda told: told.update(objects=[]),
        lambda told: told["objects"].update({"x.zarr/../../y": {"size": 1, "sha256": "0"}}),
        lambda told: told["objects"].update({"elsewhere": {"size": 1, "sha256": "0"}}),
        lambda told: told["objects"].update({"x.parquet": 5}),
        lambda told: told["objects"].update({"x.parquet": {"size": "5", "sha256": "0"}}),
        lambda told: told["objects"].update({"x.parquet": {"size": 10.0, "sha256": "0"}}),
        lambda told: told["objects"].update({"x.parquet": {"size": -1, "sha256": "0"}}),
        lambda told: told["objects"].update({"x.parquet": {"size": 5}}),
    ],
)
def test_a_manifest_that_lies_is_told_in_one_line(
    store: Store, tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    pointer = publish(str(tmp_path / "shared"), store.path, index_path(store.path))
    path = Path(pointer["url"]) / MANIFEST
    told = json.loads(path.read_text(encoding="utf-8"))
    change(told)
    content = json.dumps(told).encode()
    path.write_bytes(content)
    write_pointer(tmp_path / "p.zarr", pointer | {"manifest_sha256": hashlib.sha256(content).hexdigest()})
    with pytest.raises(UserError, match=r"manifest\.json: names no store") as failure:
        Store.open(tmp_path / "p.zarr")
    assert "\n" not in str(failure.value)


def test_a_huge_manifest_is_not_read(store: Store, tmp_path: Path) -> None:
    pointer = publish(str(tmp_path / "shared"), store.path, index_path(store.path))
    os.truncate(Path(pointer["url"]) / MANIFEST, 1 << 40)
    write_pointer(tmp_path / "p.zarr", pointer)
    with pytest.raises(UserError, match="bytes, more than"):
        Store.open(tmp_path / "p.zarr")


def test_a_file_url_is_read_too(store: Store, tmp_path: Path) -> None:
    same(Store.open(sent(f"file://{tmp_path}/shared", store)), store)
