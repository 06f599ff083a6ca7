"""Who is let in by the server of `make ui`, by a flow's own server and by that of the pages."""

from __future__ import annotations

import base64
import http.server
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from playwright.sync_api import Browser
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from flows import access, runtime, serve
from prelar.utils.errors import UserError
from tests.browser import empty_page, launched, picture, read_artifact, run_from_form, sign_in
from tests.flows.toy_pipeline import Toy, make_toy
from tests.serving import create_run, serving, split, told

WORD = "me:a long enough word"
BASIC = {"Authorization": f"Basic {base64.b64encode(WORD.encode()).decode()}"}
NEAR, FAR = "127.0.0.1", "0.0.0.0"
REBOUND = "elsewhere.example"
ATTACK = Path(__file__).with_name("attack.js").read_text(encoding="utf-8")
SOCKETS = ("events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled")
PAGES = (
    *("dashboard", "runs", "flows", "deployments", "work-pools", "blocks", "variables", "automations"),
    *("events", "concurrency-limits", "artifacts", "settings"),
)
FLOWS = {
    "pipeline": "pipeline",
    "experiments": "experiments",
    "ssv2": "store-ssv2",
    "demos": "store-demos",
}
UI_PAGES = {"/v2": PAGES, "": PAGES[1:4]}
"""The pages of the UI that are looked at, by the version that stands in their address."""


@contextmanager
def gate(address: str = NEAR) -> Iterator[str]:
    """The address of an application that echoes what it was asked for, behind the gate of a server."""

    async def echo(line: WebSocket) -> None:
        await line.accept()
        await line.send_text(line.url.path)
        await line.close()

    routes = [
        Route("/{path:path}", lambda request: PlainTextResponse(request.url.path), methods=["GET", "POST"]),
        WebSocketRoute("/{path:path}", echo),
    ]
    guarded = access.Gate(Starlette(routes=routes), WORD, address)
    server = uvicorn.Server(uvicorn.Config(guarded, log_level="error"))
    with socket.create_server((NEAR, 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://{NEAR}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.mark.parametrize(
    ("address", "host", "status"),
    [
        (NEAR, "127.0.0.1:4200", 200),
        (NEAR, "localhost:9", 200),
        (NEAR, "LOCALHOST", 200),
        (NEAR, "[::1]:4200", 200),
        ("::1", "[::1]:4200", 200),
        (NEAR, "elsewhere.example", 400),
        (NEAR, "127.0.0.1.elsewhere.example:4200", 400),
        (NEAR, "elsewhere.example@127.0.0.1:4200", 400),
        (NEAR, "localhost.", 400),
        (NEAR, "0.0.0.0:4200", 400),
        (NEAR, "192.168.1.5:4200", 400),
        (NEAR, "", 400),
        (FAR, "192.168.1.5:4200", 200),
        (FAR, "elsewhere.example:4200", 400),
    ],
)
def test_a_server_answers_to_its_names_alone(address: str, host: str, status: int) -> None:
    with gate(address) as url:
        asked = httpx.get(f"{url}/api/flows", headers=BASIC | {"Host": host})
    assert asked.status_code == status, asked.text


def test_its_own_name_is_one_beyond_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Head")
    monkeypatch.setattr("socket.getfqdn", lambda: "head.lab.example")
    for address, status in ((FAR, 200), (NEAR, 400)):
        with gate(address) as url:
            for host in ("head:4200", "head.lab.example:4200"):
                assert httpx.get(url, headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:4200", 200),
        ("http://127.0.0.1:4201", 403),
        ("http://localhost:4200", 403),
        ("https://127.0.0.1:4200", 403),
        ("http://elsewhere.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_the_page_that_asks_is_its_own(origin: str, status: int) -> None:
    with gate() as url:
        for path in ("/api/flows", "/api/health", "/"):
            asked = httpx.post(url + path, headers=BASIC | {"Host": "127.0.0.1:4200", "Origin": origin})
            assert asked.status_code == status
            assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (BASIC, 200),
        ({}, 401),
        ({"Authorization": "Basic"}, 401),
        ({"Authorization": "Basic é"}, 401),
        ({"Authorization": f"Bearer {WORD}"}, 401),
        ({"Authorization": f"Basic {base64.b64encode(b'me:another').decode()}"}, 401),
    ],
)
def test_the_string_is_asked_for(given: dict[str, str], status: int) -> None:
    sent = {key: value.encode("latin-1") for key, value in given.items()}
    paths = (("GET", "/api/flows"), ("POST", "/api/health/x"), ("GET", "/api"), ("GET", "/apix"))
    with gate() as url:
        for method, path in paths:
            assert httpx.request(method, url + path, headers=sent).status_code == status
        for path in ("/api/health", "/v2/dashboard"):
            assert httpx.get(url + path).is_success
    if status == 200:
        with gate() as url, connect(f"{url.replace('http', 'ws')}/x", additional_headers=given) as line:
            assert line.recv() == "/x"


@pytest.mark.parametrize("given", [None, "", "short", "é" * 20, "a\nb" * 10])
def test_beyond_this_machine_a_password_is_demanded(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(access.SERVER_AUTH, given or "")
    if given is None:
        monkeypatch.delenv(access.SERVER_AUTH)
    monkeypatch.setattr("sys.argv", ["flows.serve", "--host", FAR, "--port", "0"])
    with pytest.raises(UserError, match=f"^{access.SERVER_AUTH}: .") as refused:
        serve.main()
    assert "\n" not in str(refused.value) and (not given or given not in str(refused.value))


def test_a_password_of_the_users_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert access.own_string(NEAR) is None
    monkeypatch.setenv(access.SERVER_AUTH, WORD)
    assert access.own_string(NEAR) == access.own_string(FAR) == WORD
    assert access.draw() != access.draw()


@pytest.mark.long
def test_the_server_of_a_flow_asks_for_its_string(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As that of the UI does, with the same gate before it."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with runtime._temporary(access.draw()) as url:
        assert httpx.post(f"{url}/flows/filter", json={}).status_code == 401
        refuse_sockets(url)


def test_a_string_goes_to_no_other_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with access.kept("http://127.0.0.1:4200/api", WORD):
        assert stat.S_IMODE((tmp_path / "auth-4200").stat().st_mode) == 0o600
        assert access.find("http://localhost:4200/api/") == WORD
        for other in ("http://head:4200/api", "http://127.0.0.1:4201/api", "nonsense", "http://[/api"):
            assert access.find(other) is None
        monkeypatch.setenv(runtime.API, "http://127.0.0.1:4200/api")
        monkeypatch.setenv(access.AUTH, "gone after the test")
        monkeypatch.delenv(access.AUTH)
        runtime.set_environment()
        assert os.environ.pop(access.AUTH) == WORD
    assert access.find("http://127.0.0.1:4200/api") is None


def test_pages_are_for_who_knows_the_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(runtime.PAGES_URL, "")
    with serve._pages(NEAR):
        (runtime.PAGES / "one.html").write_text("<p>one</p>", encoding="utf-8")
        (runtime.PAGES / "below").mkdir()
        (runtime.PAGES / "below/two.html").write_text("two", encoding="utf-8")
        (tmp_path / "reports/index.html").write_text("another", encoding="utf-8")
        place = os.environ[runtime.PAGES_URL]
        asked = httpx.get(f"{place}/one.html")
        assert asked.text == "<p>one</p>" and "default-src 'none'" in asked.headers["content-security-policy"]
        for name in (
            "",
            "below",
            "below/two.html",
            "../index.html",
            "..%2findex.html",
            "one.html/",
            "%00.html",
        ):
            refused = raw(place, f"/{place.rpartition('/')[2]}/{name}")
            assert refused.startswith("HTTP/1.0 404") and "one" not in refused.partition("\r\n\r\n")[2]
        root = place.rpartition("/")[0]
        for path in ("", "/one.html", "/x/one.html", "//one.html", f"/{'é' * 43}/one.html"):
            assert httpx.get(root + path).status_code == 401
        assert httpx.get(f"{place}/one.html", headers={"Host": "elsewhere.example"}).status_code == 400
        assert httpx.get(f"{place}/one.html", headers={"Origin": "http://elsewhere"}).status_code == 403


def test_a_browser_that_leaves_early_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(runtime.PAGES_URL, "")
    ended = threading.Event()
    monkeypatch.setattr(serve._Pages, "shutdown_request", lambda *_: ended.set())
    with serve._pages(NEAR):
        (runtime.PAGES / "one.html").write_bytes(b"x" * 50_000_000)
        place = os.environ[runtime.PAGES_URL]
        with httpx.stream("GET", f"{place}/one.html") as answer:
            assert answer.is_success
        assert ended.wait(20)
    assert capfd.readouterr().err == ""


def raw(place: str, path: str) -> str:
    """The answer to a path that a client would tidy up."""
    url = httpx.URL(place)
    with socket.create_connection((url.host, url.port or 80)) as line:
        line.sendall(f"GET {path} HTTP/1.0\r\nHost: {url.netloc.decode()}\r\n\r\n".encode())
        return b"".join(iter(lambda: line.recv(4096), b"")).decode()


def refuse_sockets(url: str) -> None:
    """See that no web socket of an API opens without its string."""
    for path in SOCKETS:
        for words in (None, ["prefect"]):
            with (
                pytest.raises(InvalidStatus) as refused,
                connect(f"{url.replace('http', 'ws')}/{path}", subprotocols=words),  # type: ignore[arg-type]
            ):
                pass
            assert refused.value.response.status_code == 401


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def api(toy: Toy) -> Iterator[str]:
    """The API of `make ui`, with its string, beside another user's folder for runners."""
    folder = toy.root.parent / "tmp"
    folder.mkdir()
    (folder / "runner_storage").write_text("another user's", encoding="utf-8")
    with serving(toy.root, toy.environment(TMPDIR=str(folder))) as url:
        yield url


def test_a_server_that_refuses_is_told_in_one_line(
    api: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url, auth = split(api)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv(runtime.API, url)
    monkeypatch.delenv(access.AUTH, raising=False)
    for held, why in ((None, "is not set"), ("me:wrong", "is wrong")):
        if held:
            monkeypatch.setenv(access.AUTH, held)
        with pytest.raises(UserError, match=f"{access.AUTH} {why}; export it"), runtime.server():
            pass
    monkeypatch.setenv(access.AUTH, auth)
    with runtime.server() as reached:
        assert reached == url
    assert capsys.readouterr().err == ""


def test_a_process_without_the_string_gets_nowhere(toy: Toy, api: str) -> None:
    url, auth = split(api)
    assert httpx.get(f"{url}/health").is_success
    for method, path in (
        ("GET", "admin/settings"),
        ("GET", "csrf-token?client=x"),
        ("POST", "deployments/filter"),
        ("GET", "docs"),
    ):
        assert httpx.request(method, f"{url}/{path}").status_code == 401
    assert httpx.post(f"{api}/deployments/filter", json={}).status_code == 403, "no CSRF token"
    assert told("POST", f"{api}/deployments/filter", json={}).is_success
    refuse_sockets(url)
    kept = toy.root / f".prefect/auth-{httpx.URL(url).port}"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    secret = auth.partition(":")[2]
    assert not [line for line in command_lines() if secret in line]


def command_lines() -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            yield " ".join(process.cmdline())
        except psutil.Error:
            continue


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser that is told a wrong address of a foreign name: this machine's."""
    with launched(f"--host-resolver-rules=MAP {REBOUND} {NEAR}") as browser:
        yield browser


@pytest.mark.long
def test_the_ui_works_signed_in(browser: Browser, api: str) -> None:
    with empty_page(browser) as (page, hosts):
        refused: list[str] = []
        ui = sign_in(page, api)
        page.on(
            "response", lambda answer: refused.append(answer.url) if answer.status in (401, 403) else None
        )
        for version in ("/v2", ""):
            for name in UI_PAGES[version]:
                page.goto(f"{ui}{version}/{name}")
                page.wait_for_load_state("networkidle")
                assert "/login" not in page.url
            page.goto(f"{ui}{version}/deployments")
            page.get_by_text("demos", exact=True).first.wait_for()
            picture(page, f"deployments{version.replace('/', '-')}")
        assert not refused
        run_from_form(page, ui, "pipeline", "from-a-form", {"seed": "3"})
        page.get_by_text("Completed", exact=True).first.wait_for()
        told_of, links = read_artifact(page, "result")
        assert re.search(r"seed\s+3", told_of) and "success_rate" in told_of
        (name,) = [text for text in links if text.startswith("reports/experiments/")]
        assert hosts == {httpx.URL(api).netloc.decode()}
        assert page.goto(links[name]).ok


@contextmanager
def foreign_page() -> Iterator[int]:
    """The port of somebody else's server on this machine, which has an empty page."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<body></body>")

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((NEAR, 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_page_of_another_gets_nowhere(browser: Browser, toy: Toy, api: str) -> None:
    """From another port, from another domain, and from a domain that is led to the server itself."""
    url, _ = split(api)
    own = httpx.URL(url).port
    held = told("GET", f"{api}/deployments/name/store-ssv2/ssv2").json()
    with foreign_page() as port, empty_page(browser) as (page, _):
        sign_in(page, api)
        for place, asked in (
            (f"http://{NEAR}:{port}", url),
            (f"http://{REBOUND}:{port}", url),
            (f"http://{REBOUND}:{own}", f"http://{REBOUND}:{own}/api"),
        ):
            page.context.route(
                f"http://{REBOUND}:{own}/page",
                lambda route: route.fulfill(body="<body></body>", content_type="text/html"),
            )
            other = page.context.new_page()
            other.goto(f"{place}/page")
            found: list[Any] = other.evaluate(ATTACK, {"api": asked, "id": held["id"]})
            assert len(found) > 20 and not [one for one in found if one[1]], (place, found)
            other.close()
    after = told("GET", f"{api}/deployments/name/store-ssv2/ssv2").json()
    assert after["pull_steps"] == held["pull_steps"] and after["entrypoint"] == held["entrypoint"]
    runs = {"deployments": {"id": {"any_": [held["id"]]}}}
    assert told("POST", f"{api}/flow_runs/filter", json=runs).json() == []
    assert not list(toy.root.rglob("marker"))


def test_the_deployments_wait_for_each_other_and_start_nothing_by_themselves(api: str) -> None:
    held = told("POST", f"{api}/deployments/filter", json={}).json()
    assert {one["name"] for one in held} == FLOWS.keys()
    for one in held:
        assert one["description"] and one["tags"] and one["global_concurrency_limit"]["limit"] == 1
        assert not any(schedule["active"] for schedule in one["schedules"])
        checked = create_run(api, f"{FLOWS[one['name']]}/{one['name']}", state="CANCELLED")
        assert checked.is_success, f"its defaults are valid: {checked.text}"
    refused = create_run(api, "pipeline/pipeline", params={"beta_a": -1})
    assert 400 <= refused.status_code < 500 and "beta_a" in refused.text
