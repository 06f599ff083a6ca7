"""Downloads: continued after any break, begun anew when the file changed, and silent about secrets."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelar.utils import disk
from prelar.utils.errors import UserError
from prelar.videos import download
from prelar.videos.download import Patience, fetch, secrets, shown
from tests.webserver import Behaviour, Server, serve

DATA = os.urandom(50_000)
QUICK = Patience(silence=3.0, pause=0.001, longest=0.01)


def get(url: str, folder: Path, **more: object) -> bytes:
    (path,) = fetch([url], folder, patience=QUICK, **more)  # type: ignore[arg-type]
    assert {item.name for item in folder.iterdir()} == {path.name}
    return path.read_bytes()


def ranges(requests: list[tuple[str, dict[str, str]]]) -> list[str | None]:
    return [headers.get("Range") for _, headers in requests]


def test_parts_come_in_the_order_of_the_urls(tmp_path: Path) -> None:
    files = {f"v2-{number:02d}": os.urandom(3000) for number in range(7)}
    with serve(files) as server:
        paths = fetch([f"{server.url}/{name}?key=s" for name in files], tmp_path, patience=QUICK)
        assert [path.name for path in paths] == list(files)
        assert [path.read_bytes() for path in paths] == list(files.values())
        fetch([f"{server.url}/{name}?key=s" for name in files], tmp_path, patience=QUICK)
        assert len(server.requests) == 7


def test_same_names_are_numbered(tmp_path: Path) -> None:
    with serve({"a/x": b"1", "b/x": b"2"}) as server:
        paths = fetch([f"{server.url}/a/x", f"{server.url}/b/x"], tmp_path, patience=QUICK)
    assert [path.name for path in paths] == ["part-00", "part-01"]
    assert [path.read_bytes() for path in paths] == [b"1", b"2"]


def test_a_break_is_continued_where_it_was(tmp_path: Path) -> None:
    seen: list[int] = []
    with serve({"x": DATA}, Behaviour(breaks=3, after=10_000)) as server:
        assert get(f"{server.url}/x", tmp_path, progress=seen.append) == DATA
        assert ranges(server.requests) == [None, "bytes=10000-", "bytes=20000-", "bytes=30000-"]
    assert sum(seen) == len(DATA)


def test_a_server_that_falls_silent_is_asked_again_where_it_was(tmp_path: Path) -> None:
    silent = Behaviour(stalls=2, after=10_000)
    with serve({"x": DATA}, silent) as server:
        (path,) = fetch([f"{server.url}/x"], tmp_path, patience=dataclasses.replace(QUICK, silence=1.0))
        assert path.read_bytes() == DATA
        assert ranges(server.requests) == [None, "bytes=10000-", "bytes=20000-"]
        silent.stalled.set()


def test_a_stopped_download_is_continued_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    with serve({"x": DATA}, Behaviour(breaks=1, after=10_000)) as server:
        server.behaviour.on_request = lambda wrong: (
            setattr(wrong, "errors", 99) if wrong.breaks == 0 else None
        )
        with pytest.raises(UserError, match="run again to continue"):
            get(f"{server.url}/x", tmp_path)
        server.behaviour.on_request = lambda wrong: setattr(wrong, "errors", 0)
        server.requests.clear()
        assert get(f"{server.url}/x", tmp_path) == DATA
        assert ranges(server.requests) == ["bytes=10000-"]


def test_a_server_that_forgets_ranges_starts_anew(tmp_path: Path) -> None:
    seen: list[int] = []
    with serve({"x": DATA}, Behaviour(breaks=2, after=10_000, ranges=False)) as server:
        assert get(f"{server.url}/x", tmp_path, progress=seen.append) == DATA
    assert sum(seen) == len(DATA)


@pytest.mark.parametrize("told", ["etag", "modified", "length"])
def test_a_file_that_changed_starts_anew(tmp_path: Path, told: str) -> None:
    """The second request finds another file, which the server tells by one sign only."""
    new = os.urandom(len(DATA) + (5 if told == "length" else 0))
    with serve({"x": DATA}, Behaviour(breaks=1, after=10_000, etag=None, modified=None)) as server:
        if told != "length":
            setattr(server.behaviour, told, "first")

        def change(wrong: Behaviour) -> None:
            if len(server.requests) == 2:
                server.files["x"] = new
                if told != "length":
                    setattr(wrong, told, "second")

        server.behaviour.on_request = change
        assert get(f"{server.url}/x", tmp_path) == new


def test_a_partial_longer_than_the_file_starts_anew(tmp_path: Path) -> None:
    with serve({"x": DATA}, Behaviour(breaks=1, after=20_000)) as server:
        server.behaviour.on_request = lambda wrong: server.files.update(x=DATA[:9000])
        server.files["x"] = DATA
        assert get(f"{server.url}/x", tmp_path) == DATA[:9000]


def test_without_a_length_the_end_of_the_answer_is_the_end(tmp_path: Path) -> None:
    with serve({"x": DATA}, Behaviour(length=False)) as server:
        assert get(f"{server.url}/x", tmp_path) == DATA
    with serve({"empty": b""}) as server:
        assert get(f"{server.url}/empty", tmp_path / "empty") == b""


def test_errors_that_pass_are_retried(tmp_path: Path) -> None:
    with serve({"x": DATA}, Behaviour(errors=4)) as server:
        assert get(f"{server.url}/x", tmp_path) == DATA
        assert len(server.requests) == 5


def test_errors_that_stay_are_told(tmp_path: Path) -> None:
    with serve({"x": DATA}) as server:
        with pytest.raises(UserError, match="answers 404"):
            get(f"{server.url}/y", tmp_path)
        assert len(server.requests) == 1
        server.behaviour.errors = 99
        with pytest.raises(UserError, match="answers 503"):
            get(f"{server.url}/x", tmp_path)
        url = server.url
    with pytest.raises(UserError, match="run again"):
        get(f"{url}/x", tmp_path)
    with pytest.raises(UserError, match="not an http"):
        get("ftp://host/x", tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Behaviour(content_length="9" * 5000), "run again"),
        (Behaviour(redirect="http://h:port"), "Invalid URL in location header"),
    ],
)
def test_nonsense_that_stays_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Behaviour, message: str
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    with serve({"x": DATA}, wrong) as server, pytest.raises(UserError, match=message) as told:
        get(f"{server.url}/x", tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "wrong",
    [
        Behaviour(breaks=1, after=10_000, content_range=f"bytes 10000-49999/{'9' * 5000}"),
        Behaviour(errors=1, retry_after="\xb2"),
    ],
)
def test_nonsense_does_not_stop_a_download(tmp_path: Path, wrong: Behaviour) -> None:
    with serve({"x": DATA}, wrong) as server:
        assert get(f"{server.url}/x", tmp_path) == DATA


@pytest.mark.parametrize("told", ["", "-1", "many", "9" * 30])
def test_lengths_that_are_none_are_refused(told: str) -> None:
    with pytest.raises(download._Broken, match="Content-Length"):
        download._length(httpx.Response(200, headers={"Content-Length": told}))


def test_what_is_no_url_is_told_without_repeating_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ssv2\.source: URL 2 of the list is not one") as told:
        fetch(["http://h/x", "http://me:hush@h:port/x"], tmp_path)
    assert "hush" not in str(told.value)


def test_the_digest_is_checked(tmp_path: Path) -> None:
    with serve({"x": DATA}) as server:
        with pytest.raises(UserError, match="sha256"):
            get(f"{server.url}/x#sha256={'0' * 64}", tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert get(f"{server.url}/x#sha256={hashlib.sha256(DATA).hexdigest()}", tmp_path) == DATA


def test_secrets_go_to_their_own_host_only_and_are_never_shown(tmp_path: Path) -> None:
    given = secrets({download.HEADERS: "X-Key: hush\n\nX-Other: b", download.COOKIES: "session=hush"})
    assert given == {"X-Key": "hush", "X-Other": "b", "Cookie": "session=hush"}
    with serve({"x": DATA}, Behaviour(needs=("X-Key", "hush"))) as server:
        assert get(f"{server.url}/x", tmp_path / "a", headers=given) == DATA
        with pytest.raises(UserError) as refused:
            get(f"{server.url}/x?token=hush", tmp_path / "b")
        assert "hush" not in str(refused.value)
        assert download.COOKIES in str(refused.value)
        server.behaviour.needs = None
        with serve({}, Behaviour(redirect=server.url)) as first:
            server.requests.clear()
            assert get(f"{first.url}/x", tmp_path / "c", headers=given) == DATA
            assert "hush" in str(first.requests)
            assert "hush" not in str(server.requests)
            server.behaviour.redirect = first.url
            with pytest.raises(UserError, match="redirects more than"):
                get(f"{first.url}/x", tmp_path / "d")
    with pytest.raises(UserError) as wrong:
        secrets({download.HEADERS: "hush hush"})
    assert "hush" not in str(wrong.value)
    assert shown("https://me:hush@host:81/a/b?token=hush#hush") == "https://host:81/a/b"


def test_one_failure_stops_the_others(tmp_path: Path) -> None:
    with serve({"x": DATA}, Behaviour(errors=10_000)) as server:
        slow = Patience(silence=3.0, pause=60.0, longest=60.0)
        with pytest.raises(UserError, match=r"answers 404|not an http"):
            fetch(["ftp://host/y", f"{server.url}/x"], tmp_path, patience=slow)
        server.behaviour.errors = 0
        server.behaviour.on_request = lambda wrong: setattr(
            wrong, "errors", int("x" in server.requests[-1][0])
        )
        with pytest.raises(UserError, match="answers 404"):
            fetch([f"{server.url}/nothing", f"{server.url}/x"], tmp_path, patience=slow)


@pytest.mark.parametrize("slow_first", [True, False])
@pytest.mark.parametrize("wrong", ["ftp://host/y", "{url}/nothing"])
def test_a_failure_is_told_while_others_go_on(tmp_path: Path, wrong: str, slow_first: bool) -> None:
    """Wherever it stands in the list: nobody waits for hours to hear that a part cannot be had."""
    with serve({"x": DATA}, Behaviour(pace=0.001)) as server:
        urls = [f"{server.url}/x", wrong.format(url=server.url)]
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"answers 404|not an http"):
            fetch(urls if slow_first else urls[::-1], tmp_path, patience=Patience())
        assert time.monotonic() - begun < len(DATA) * 0.001 / 2


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><title>Sign in</title>", b"\n <HTML lang=en>Sign in"])
def test_a_page_in_place_of_a_file_is_told_and_not_kept(tmp_path: Path, page: bytes) -> None:
    """Sites that want a login answer 200 and show their own page to whoever has none."""
    with serve({"x": page}) as server:
        with pytest.raises(UserError, match=rf"a web page.*{download.COOKIES}"):
            get(f"{server.url}/x", tmp_path)
        server.files["x"] = DATA
        assert get(f"{server.url}/x", tmp_path) == DATA


@pytest.fixture(scope="module")
def echo() -> Iterator[Server]:
    with serve({"x": b"x"}) as server:
        yield server


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.sampled_from([(download.HEADERS, "X-Key"), (download.COOKIES, "Cookie")]))
def test_any_secret_is_sent_as_it_is_or_refused_without_a_word_of_it(
    echo: Server, text: str, place: tuple[str, str]
) -> None:
    variable, name = place
    given = f"hush{text}hush"
    try:
        headers = secrets({variable: f"X-Key: {given}" if variable == download.HEADERS else given})
        with tempfile.TemporaryDirectory() as folder:
            fetch([f"{echo.url}/x"], Path(folder), headers=headers, patience=QUICK)
    except UserError as error:
        assert "hush" not in str(error)
    else:
        assert echo.requests[-1][1][name] == headers[name]
        assert headers[name] == given or len(given.splitlines()) > 1


def test_a_server_that_sends_a_byte_at_a_time_is_told(tmp_path: Path) -> None:
    hurried = dataclasses.replace(QUICK, silence=0.3)
    with serve({"x": DATA}, Behaviour(pace=0.02)) as server:
        with pytest.raises(UserError, match=r"sends \d+ bytes in \d s; run again to continue"):
            fetch([f"{server.url}/x"], tmp_path, patience=hurried)
        assert len(server.requests) == download.ATTEMPTS
        held = (tmp_path / "x.partial").stat().st_size
        server.behaviour.pace = None
        assert get(f"{server.url}/x", tmp_path) == DATA
        assert ranges(server.requests)[-1] == f"bytes={held}-"


def test_a_file_of_no_told_length_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"x": DATA}, Behaviour(length=False)) as server:
        monkeypatch.setattr(download, "LARGEST", len(DATA) - 1)
        with pytest.raises(UserError, match="tells no length, and sends more than"):
            get(f"{server.url}/x", tmp_path)
        (tmp_path / "x.partial").unlink()
        monkeypatch.setattr(download, "LARGEST", len(DATA))
        assert get(f"{server.url}/x", tmp_path) == DATA


def test_a_file_that_finds_no_room_is_told_before_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 100)
    with serve({"x": DATA}) as server, pytest.raises(UserError, match="free"):
        get(f"{server.url}/x", tmp_path)
    assert not (tmp_path / "x.partial").exists()
