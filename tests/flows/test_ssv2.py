"""The ssv2 flow as its users run it: killed, refused by validation, continued, and always the same bytes."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows import decoding, ssv2, staging
from prelar.store.schema import checks_path
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils import files
from prelar.utils.errors import UserError
from prelar.utils.video_file import ffmpeg_binary
from prelar.videos import ingest
from prelar.videos.decode import Decoder
from prelar.videos.ingest import Ingested, after_committed, append, append_missing, attributes, batches
from prelar.videos.labels import read_labels
from tests import archives
from tests.conftest import ROOT, merge, prefect_home
from tests.flows.kills import Interruption, kill_until_done, tree
from tests.webserver import Behaviour, serve

CONTENTS = {**archives.clips(46), "900": b"", "901": b"no video", "902": archives.clip(frames=30)[:-2000]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and a source under data/sample."""
    monkeypatch.chdir(tmp_path)
    archives.source(tmp_path / "data/sample", CONTENTS, "zip")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(prefect_home(), tmp_path / ".prefect")
    change(batch=2, max_bad=0.1)
    return tmp_path


def change(**values: object) -> None:
    """Change the group ssv2 of params.yaml in the current folder."""
    from ruamel.yaml import YAML

    yaml = YAML()
    params = yaml.load(Path("params.yaml"))
    merge(params, {"ssv2": values})
    yaml.dump(params, Path("params.yaml"))


@functools.cache
def decoded() -> dict[str, Ingested]:
    """Every clip of CONTENTS, decoded once."""
    with tempfile.TemporaryDirectory() as folder:
        archives.source(Path(folder), CONTENTS, "zip")
        source, decoder = ingest.folder_source(Path(folder), None), Decoder()
        known = read_labels(source.labels)
        return {
            done.row["id"]: done
            for batch in batches(source.members(), 16)
            for done in ingest.ingest(decoder, batch, known, 8)
        }


def undisturbed(folder: Path, work: Path) -> dict[str, bytes]:
    """What the source in `folder` must become, built without flow, Prefect or interruption."""
    source, clips = ingest.folder_source(folder, None), decoded()
    known = read_labels(source.labels)
    with StoreWriter(work / "ssv2.zarr") as writer:
        append(writer, [clips[member.id] for member in source.members()])
        append_missing(writer, known)
        writer.finish(attributes(writer, Decoder().version, 8))
    return tree(work, "ssv2")


def start(**environment: str) -> subprocess.Popen[str]:
    """The flow as a user starts it, who can press Ctrl-C: jobs in a shell's background inherit it ignored."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows.ssv2"],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(**environment: str) -> tuple[int, str, str]:
    process = start(**environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def commits() -> int:
    """Lines in the journal of the staged store."""
    found = list(files.STAGING.glob("ssv2-*/ssv2.journal"))
    return found[0].read_bytes().count(b"\n") if found else 0


def servers_of(pid: int) -> list[str]:
    """Command lines of temporary Prefect servers that belong to a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "flows.runtime" in line and f", {pid}, " in line:
            found.append(line)
    return found


def artifacts() -> list[str]:
    """The validation artifacts that Prefect holds, oldest first."""
    with contextlib.closing(sqlite3.connect(".prefect/prefect.db")) as base:
        found = base.execute("SELECT data FROM artifact WHERE key = 'validation-ssv2' ORDER BY created")
        return [json.loads(data) for (data,) in found]


@pytest.mark.long
@pytest.mark.parametrize("refused", [False, True])
def test_killed_refused_continued(here: Path, refused: bool) -> None:
    """A story in two or three runs: kill -9 in the middle, too many bad clips, and then whole.

    The parts come by HTTP from a server that breaks off, with secrets; the given Prefect server is not there.
    """
    wanted = undisturbed(here / "data/sample", here / "work")
    parts = {path.name: path.read_bytes() for path in (here / "data/sample").iterdir()}
    secret = {
        "PRELAR_HTTP_HEADERS": "X-Key: hush",
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "PREFECT_HOME": str(here / ".prefect"),
    }
    with serve(parts, Behaviour(breaks=2, after=30_000, needs=("X-Key", "hush"))) as server:
        change(source=[f"{server.url}/{name}?token=hush" for name in parts], max_bad=0.0)
        process = start(**secret)
        wait_for(lambda: commits() >= 4, process)
        assert servers_of(process.pid)
        process.kill()
        process.communicate()
        held = commits()
    time.sleep(0.5)
    assert servers_of(process.pid) == []
    assert not Path("data/ssv2.zarr").exists()

    if refused:
        status, out, err = run(**secret)
        assert status == 2, err
        assert "http://127.0.0.1:9/api" in err.splitlines()[0]
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "at most 0.00% of the clips are bad" in errors[0]
        assert "Traceback" not in err
        assert not Path("data/ssv2.zarr").exists()
        assert commits() > held

    change(max_bad=0.1)
    status, out, err = run(**secret)
    assert status == 0, err
    assert "http://127.0.0.1:9/api" in err.splitlines()[0]
    assert "46 clips" in out
    assert tree(here / "data", "ssv2") == wanted
    assert [path.name for path in files.STAGING.iterdir()] != []
    assert all(path.name.startswith("ssv2-parts-") for path in files.STAGING.iterdir())
    shown = artifacts()
    assert [text.splitlines()[0].removeprefix("# ssv2: validation ") for text in shown] == [
        *(["failed"] if refused else []),
        "passed",
    ]
    assert all("| clips | 46 |" in text and "at most" in text for text in shown)
    assert "hush" not in out + err
    for path in (path for folder in (".prefect", "reports") for path in Path(folder).rglob("*")):
        assert not path.is_file() or b"hush" not in path.read_bytes(), path


@pytest.mark.long
def test_what_was_valid_once_is_validated_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its validation, the flow is run again with stricter settings."""
    pool = ThreadPoolExecutor(2)
    monkeypatch.setattr(decoding.decode, "submit", lambda *given: pool.submit(decoding.decode.fn, *given))
    monkeypatch.setattr(staging, "validate", staging.validate.fn)
    with monkeypatch.context() as context, pytest.raises(InterruptedError):
        context.setattr(staging, "publish", interrupt)
        ssv2.ssv2.fn()
    change(max_bad=0.0)
    with pytest.raises(UserError, match=r"at most 0\.00% of the clips are bad"):
        ssv2.ssv2.fn()
    assert not Path("data/ssv2.zarr").exists()
    change(max_bad=0.1)
    monkeypatch.setattr(ssv2, "fill", None)
    assert ssv2.ssv2.fn().startswith("46 clips, ")
    assert Store.open("data/ssv2.zarr").num_clips == 46


def interrupt(*arguments: object, **named: object) -> None:
    raise InterruptedError


def work_once(source: ingest.Source, clips: dict[str, Ingested]) -> None:
    """What the flow does, but for Prefect, decoding and validation."""
    known = read_labels(source.labels)
    staging.clear_leftovers("ssv2")
    folder = files.STAGING / "ssv2-key"
    if not (folder / "built").is_file():
        with StoreWriter(folder / "ssv2.zarr") as writer:
            for batch in batches(after_committed(source.members(), writer), 2):
                append(writer, [clips[member.id] for member in batch])
            append_missing(writer, known)
            writer.finish(attributes(writer, Decoder().version, 8))
        files.write_text(folder / "built", "")
    files.write_text(checks_path(folder / "ssv2.zarr"), "{}")
    staging.publish("ssv2", folder)


def kills_survived(here: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the work was killed until it had the same bytes as without."""
    source = ingest.folder_source(here / "data/sample", None)
    wanted, clips = undisturbed(here / "data/sample", here / f"work-{seed}"), decoded()
    return kill_until_done("ssv2", lambda: work_once(source, clips), wanted, seed, monkeypatch)


def test_killed_at_many_operations_and_still_the_same_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kills_survived(here, 0, monkeypatch) >= 20


def fill_up(folder: Path) -> None:
    """Run on a disk of 1 MB that grows by as much whenever it was full, until a run ends by itself."""
    os.chdir(folder)
    source = ingest.folder_source(folder / "source", None)
    clips = decoded()
    mount = ["mount", "-t", "tmpfs", "none", "data", "-o"]
    subprocess.run([*mount, "size=1m"], check=True)
    for size in range(2, 60):
        before = commits()
        try:
            work_once(source, clips)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        assert commits() >= before
        subprocess.run([*mount, f"remount,size={size}m"], check=True)
    assert size > 8
    assert list(files.STAGING.iterdir()) == []
    assert tree(folder / "data", "ssv2") == undisturbed(folder / "source", folder / "work")


@pytest.mark.long
def test_a_disk_that_was_full_again_and_again_and_still_the_same_bytes(here: Path) -> None:
    """On a file system of its own, which only this test's processes see."""
    Path("data/sample").rename("source")
    ways = (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"])
    alone = [way for way in ways if subprocess.run([*way, "true"], capture_output=True).returncode == 0]
    assert alone, "no file system can be mounted here"
    code = (
        "import os, pathlib; from tests.flows.test_ssv2 import fill_up; "
        f"fill_up(pathlib.Path({str(here)!r})); print('the same bytes', flush=True); os._exit(0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*alone[0], sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "the same bytes\n", done.stderr


@pytest.mark.long
def test_killed_while_publishing_loses_no_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill at any operation between the finished build and the cleared staging costs no decoding."""
    source = ingest.folder_source(here / "data/sample", None)
    wanted, clips = undisturbed(here / "data/sample", here / "work"), decoded()
    with monkeypatch.context() as context:
        context.setattr(staging, "publish", lambda *arguments: None)
        work_once(source, clips)
    kills = 0
    while (files.STAGING / "ssv2-key").exists():
        for path in Path("data").glob("ssv2.*"):
            files.remove(path)
        pid = os.fork()
        if pid == 0:
            Interruption(monkeypatch, kills + 1)
            work_once(source, {})
            os._exit(0)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert kills > 10
    assert tree(here / "data", "ssv2") == wanted


@pytest.mark.long
def test_killed_with_other_seeds_and_still_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(1, 30):
        assert kills_survived(here, seed, monkeypatch) >= 10


@pytest.fixture
def never_reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Prefect server may not be started."""

    def refuse() -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr(staging.runtime, "server", refuse)
    monkeypatch.setattr(sys, "argv", ["flows.ssv2"])
    yield


def test_a_second_run_names_the_first(here: Path, never_reached: None) -> None:
    with files.exclusive(staging.target("ssv2")), pytest.raises(UserError, match=f"process {os.getpid()}"):
        ssv2.main()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wokers": 3}, r"ssv2\.wokers"),
        ({"batch": 0}, r"ssv2\.batch = 0"),
        ({"max_bad": 2.0}, r"ssv2\.max_bad"),
    ],
)
def test_wrong_settings_end_it_at_once(
    here: Path, never_reached: None, values: dict[str, object], message: str
) -> None:
    change(**values)
    with pytest.raises(UserError, match=message):
        ssv2.main()


def test_help_tells_where_the_settings_are(
    never_reached: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flows.ssv2", "--help"])
    with pytest.raises(SystemExit) as end:
        ssv2.main()
    assert end.value.code == 0
    assert "params.yaml" in capsys.readouterr().out


def test_a_disk_that_is_clearly_too_small_ends_it_before_anything_is_decoded(
    here: Path, never_reached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssv2.disk, "free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="1 kB free, but the rest of the store takes about"):
        ssv2.ssv2.fn()
    assert not Path("data/ssv2.zarr").exists()


def test_stores_of_the_same_urls_do_not_download_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = ["http://127.0.0.1/part-00"]
    monkeypatch.setattr(ssv2.download, "fetch", lambda *_, **__: ssv2.fetch.fn(urls))
    with pytest.raises(UserError, match="is writing it"):
        ssv2.fetch.fn(urls)


def test_labels_and_parts_are_found(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssv2, "fetch", ssv2.fetch.fn)
    folder = Path("data/sample")
    assert ssv2.find_archive("data/sample", None).labels == folder / archives.LABELS_ZIP
    labels = folder.rename("moved") / archives.LABELS_ZIP
    parts = {path.name: path.read_bytes() for path in sorted(Path("moved").iterdir()) if path != labels}
    with serve({**parts, "labels": labels.read_bytes()}) as server:
        urls = [f"{server.url}/{name}" for name in parts]
        by_file = ssv2.find_archive(urls, str(labels))
        by_url = ssv2.find_archive(urls, f"{server.url}/labels")
        among = ssv2.find_archive([f"{server.url}/labels", *urls], None)
    for found in (by_file, by_url, among):
        assert [piece.name for piece in found.pieces] == [f"{archives.FOLDER}-{n:02d}" for n in range(3)]
        assert len(read_labels(found.labels).clips) == len(CONTENTS)
    with pytest.raises(UserError, match=r"ssv2\.labels"):
        ssv2.find_archive("moved", None) if labels.rename("elsewhere") else None


@pytest.mark.long
@pytest.mark.parametrize("number", range(4))
def test_the_flow_itself_killed_at_random_moments(here: Path, number: int) -> None:
    wanted = undisturbed(here / "data/sample", here / "work")
    random_ = random.Random(number)
    for _ in range(5):
        process = start()
        wait_for(commits, process)
        time.sleep(random_.random() * 4)
        process.kill()
        process.communicate()
        if Path("data/ssv2.zarr").exists() and Path("data/ssv2.parquet").exists():
            break
    status, _, err = run()
    assert status == 0, err
    assert tree(here / "data", "ssv2") == wanted


@pytest.mark.long
def test_ctrl_c_ends_the_ffmpegs_too(here: Path) -> None:
    """Also those of own videos, one of which takes ten minutes here."""
    slow = Path("slow-ffmpeg")
    held = f"*rawvideo*) echo $$ > {here}/held; exec sleep 600"
    slow.write_text(f'#!/bin/sh\ncase "$*" in {held};; *) exec {ffmpeg_binary()} "$@";; esac\n')
    slow.chmod(0o755)
    files.remove(Path("data/sample"))
    Path("data/sample").mkdir()
    for name in ("a.mp4", "b.webm"):
        Path("data/sample", name).write_bytes(archives.clip(suffix=f".{name[2:]}"))
    change(ffmpeg=str(slow.absolute()))
    process = start()
    wait_for(lambda: Path("held").exists() and Path("held").read_text(), process)
    decoding = int(Path("held").read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert not Path(f"/proc/{decoding}").exists()
    assert "Traceback" not in err and err.splitlines()[-1] == "interrupted"


@pytest.mark.long
def test_ctrl_c_leaves_no_output_and_a_run_to_continue(here: Path) -> None:
    process = start()
    wait_for(lambda: commits() >= 3, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert not Path("data/ssv2.zarr").exists()
    assert servers_of(process.pid) == []
    assert run()[0] == 0
