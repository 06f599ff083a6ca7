"""`python -m prelar play`: the page with the model in a server, which answers that page only and ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from prelar.simulator.play import application, respond
from prelar.simulator.step import Look, Step, gumbel_noise, load_step
from prelar.simulator.world import WORLD, World
from tests.browser import browser_page
from tests.conftest import ROOT
from tests.simulator.small import make_checkpoint, make_world

HOME, STEPS = "http://127.0.0.1:8390", "ws://127.0.0.1:8390/word/step"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("play") / "it"
    make_checkpoint(folder, "contextwm", "finetune")
    (folder / WORLD).write_bytes(make_world(load_step(folder)).content())
    return folder


@pytest.fixture(scope="module")
def played(folder: Path) -> tuple[Step, World]:
    step = load_step(folder)
    return step, make_world(step)


def ask(world: World, **changes: object) -> bytes:
    """A message for the step from frame 3 of clip 1, by default a proper one."""
    parts = {
        "model": [0],
        "clip": [1],
        "stoch": world.arrays["stoch"][1, 3],
        "deter": world.arrays["deter"][1, 3],
        "action": [0.5, -1, 0, 1],
        "noise": gumbel_noise(1, 1, (16,)),
    } | changes
    return b"".join(np.asarray(part, "<f4").tobytes() for part in parts.values())


def test_a_message_is_answered_with_the_step(played: tuple[Step, World]) -> None:
    step, world = played
    answer = respond(step, world, [], ask(world))
    noise = torch.from_numpy(gumbel_noise(1, 1, (1, 4, 4)))
    with torch.no_grad():
        expected = step(*world.start(1, 3, 4), torch.tensor([[0.5, -1, 0, 1]]), noise, *world.context(1))
    numbers = np.frombuffer(answer[:-12288], "<f4")
    assert np.array_equal(numbers[:4], expected[0].argmax(-1)[0])
    np.testing.assert_allclose(
        numbers[4:], torch.cat([part.flatten() for part in (expected[1], *expected[3:])])
    )
    assert answer[-12288:] == expected[2].numpy().tobytes()


def test_a_picture_is_answered_with_its_state_and_then_a_start(played: tuple[Step, World]) -> None:
    step, world = played
    picture, seen = world.arrays["frames"][1, 2], []
    with torch.no_grad():
        stoch, deter, _, _, _, *context = Look(step)(torch.from_numpy(picture)[None])
    numbers = np.frombuffer(respond(step, world, seen, picture.tobytes() + b"\0"), "<f4")
    assert np.array_equal(numbers[:4], stoch.argmax(-1)[0])
    np.testing.assert_allclose(numbers[4:20], deter[0])
    own = {"clip": [2], "stoch": numbers[:4], "deter": numbers[4:20]}
    answer = respond(step, world, seen, ask(world, **own))
    noise = torch.from_numpy(gumbel_noise(1, 1, (1, 4, 4)))
    with torch.no_grad():
        expected = step(stoch, deter, torch.tensor([[0.5, -1, 0, 1]]), noise, *context)
    assert answer[-12288:] == expected[2].numpy().tobytes()
    with pytest.raises(ValueError, match="range"):
        respond(step, world, [], ask(world, **own))


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": []},
        {"clip": [2]},
        {"clip": [0.5]},
        {"clip": [-1]},
        {"stoch": [0, 0, 0, 4]},
        {"action": [np.nan] * 4},
        {"deter": [np.inf] * 16},
    ],
)
def test_what_is_no_step_is_refused(played: tuple[Step, World], changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"size|range|finite"):
        respond(*played, [], ask(played[1], **changes))


@pytest.fixture(scope="module")
def client(played: tuple[Step, World]) -> Iterator[TestClient]:
    with TestClient(application(*played, 8390, "word"), base_url=HOME) as client:
        yield client


def test_other_names_origins_and_addresses_are_refused(
    client: TestClient, played: tuple[Step, World]
) -> None:
    assert client.get("/word/").status_code == 200 and client.get("/").status_code == 404
    assert client.get("/word/", headers={"Host": "attacker.example"}).status_code == 400
    for headers in (
        {},
        {"Origin": "http://attacker.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect(STEPS, headers=headers):
            pass
    with client.websocket_connect(STEPS, headers={"Origin": HOME}) as socket:
        message = ask(played[1])
        socket.send_bytes(message)
        assert socket.receive_bytes() == respond(*played, [], message)
        socket.send_bytes(message[:-1])
        with pytest.raises(WebSocketDisconnect):
            socket.receive_bytes()


def test_a_browser_plays_and_ctrl_c_ends_it(folder: Path, played: tuple[Step, World]) -> None:
    command = [sys.executable, "-m", "prelar", "play", str(folder), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", process.stdout.readline())
            assert found
            with browser_page() as (page, hosts):
                page.goto(found[0])
                page.locator("#stage:visible, #told.warn").first.wait_for()
                page.get_by_label("the learnt policy").check()
                for number in (1, 2, 3):
                    page.get_by_role("button", name="One step").click()
                    page.locator(f"#step:text-is('{number}')").wait_for()
                shown = page.evaluate("[...simulator.steps[1].frame]")
                record = page.evaluate("[...simulator.steps[1].record]")
                assert hosts == {httpx.URL(found[0]).netloc.decode()}
                process.send_signal(signal.SIGINT)
                assert process.wait(60) in (0, 130)
                page.get_by_role("button", name="One step").click()
                page.get_by_text("the server has ended").wait_for()
        finally:
            process.kill()
    step, world = played
    noise, action = torch.from_numpy(gumbel_noise(1, 1, (1, 4, 4))), torch.tensor([record]) / 127
    with torch.no_grad():
        expected = step(*world.start(0, 0, 4), action, noise, *world.context(0))[2]
    assert np.abs(expected.flatten().int().numpy() - shown).max() <= 1
