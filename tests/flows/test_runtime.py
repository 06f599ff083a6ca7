"""Prefect around a flow: settings, a server that answers, and a process that ends."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import runtime
from prelar.utils.errors import UserError
from tests.webserver import serve

ROOT = Path(__file__).parents[2]


def test_settings_are_given_and_the_users_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("PREFECT_HOME", *runtime.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_API_BLOCKS_REGISTER_ON_START", "true")
    runtime.set_environment()
    assert os.environ["PREFECT_HOME"] == str(tmp_path / ".prefect")
    assert stat.S_IMODE((tmp_path / ".prefect").stat().st_mode) == 0o700
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert int(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"]) >= 120
    assert os.environ["PREFECT_API_BLOCKS_REGISTER_ON_START"] == "true"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "intranet"}, "intranet,127.0.0.1,localhost"),
        ({"no_proxy": "intranet, localhost"}, "intranet,localhost,127.0.0.1"),
        ({"NO_PROXY": "*", "no_proxy": "*"}, "*"),
    ],
)
def test_no_proxy_stands_before_this_machine(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], wanted: str
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {"HTTP_PROXY": "http://127.0.0.1:9", **given}.items():
        monkeypatch.setenv(name, value)
    runtime.set_environment()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == wanted
    with serve({"api/health": b"true"}) as server:
        assert runtime.answers(f"{server.url}/api")


def test_a_server_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"api/health": b"true"}) as given:
        monkeypatch.setenv(runtime.API, f"{given.url}/api/")
        with runtime.server() as url:
            assert url == f"{given.url}/api/"
        assert os.environ[runtime.API] == f"{given.url}/api/"


def test_one_that_does_not_answer_is_named_and_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve({}) as given, serve({"api/health": b"true"}) as temporary:
        monkeypatch.setattr(runtime, "_temporary", lambda auth: serve_url(f"{temporary.url}/api"))
        address = given.url.removeprefix("http://")
        for wrong, named in ((f"http://me:hush@{address}/api?key=hush", address), ("nonsense", "not a URL")):
            monkeypatch.setenv(runtime.API, wrong)
            with runtime.server() as url:
                assert url == os.environ[runtime.API] == f"{temporary.url}/api"
            assert os.environ[runtime.API] == wrong
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert named in said
            assert "hush" not in said


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "http://[::1",
        "http://a b",
        "http://x..y/api",
        f"http://{'a' * 300}/api",
        "http://xn--/api",
        "http://127.0.0.1:99999/api",
        "http://127.0.0.1:-1/",
        "ftp://127.0.0.1/",
        "http://\x00/",
    ],
)
def test_at_what_is_no_url_nothing_answers(url: str) -> None:
    assert not runtime.answers(url) and runtime._shown(url).isprintable()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks://127.0.0.1:9"])
def test_a_proxy_that_prefect_cannot_use_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match=r"^a proxy of the environment \(ALL_PROXY, …\) is of no use") as told:
        runtime.answers("http://127.0.0.1:9/api")
    assert "\n" not in str(told.value)


class serve_url:
    """Stands in for a temporary server that runs already."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> str:
        return self.url

    def __exit__(self, *exception: object) -> None:
        pass


def test_a_server_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(runtime.sys, "executable", "false")
    with pytest.raises(UserError, match=r"ended at once; .*server\.log"), runtime._temporary("x"):
        pass


def finish(code: str) -> tuple[int, float, str]:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, time.monotonic() - begun, done.stderr


@pytest.mark.parametrize(
    ("main", "status"),
    [
        ("def main(): pass", 0),
        ("def main(): raise UserError('no')", 2),
        ("def main(): raise KeyboardInterrupt", 130),
        ("def main(): raise OSError", 1),
    ],
)
def test_the_process_ends_though_a_thread_does_not(main: str, status: int) -> None:
    code, seconds, said = finish(
        "import threading, time\n"
        "from prelar.utils.errors import UserError\n"
        "from flows import runtime\n"
        "runtime.GRACE = 0.5\n"
        "threading.Thread(target=time.sleep, args=(50,)).start()\n"
        f"{main}\n"
        "runtime.run(main)\n"
    )
    assert code == status
    assert seconds < 40
    assert ("error: no\n" in said) == (status == 2)
