"""`python -m prelar play`: the simulator's page, with the model in a server on this machine.

For models too large for a page, and for checkpoints that no page was made for. The server listens on the
loopback interface only, answers who has the address that it prints, which holds a word drawn at each start,
under its own name and to its own page, and takes messages of two sizes.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from prelar.config import PARAMS, Config
from prelar.simulator.page import Entry, describe, digest, find_world, render
from prelar.simulator.step import Look, Step, load_step
from prelar.simulator.world import WORLD, World, read_world
from prelar.train.loop import set_up
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME, FRAME_BYTES

HOST = "127.0.0.1"
CONNECTIONS = 16
PATIENCE = 2
Seen = list[tuple[torch.Tensor, ...]]
"""The context of the picture that a page has sent, if it has sent one."""

HEADERS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}


def run(config: Config | None, folder: Path, port: int) -> None:
    """Serve a checkpoint until Ctrl-C. `port` 0 takes a free one. None: outside a project.

    Raises `UserError` where there is no model in `folder`, nothing to start from, or the port is taken.
    """
    set_up(device="cpu", precision="fp32", threads=config.threads if config else 1)
    step = load_step(folder)
    world = _starts(config, step, folder)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: {error}; choose another, or 0 for a free one") from None
        port = listener.getsockname()[1]
        word = secrets.token_urlsafe(16)
        print(f"play: http://{HOST}:{port}/{word}/  (Ctrl-C ends it)", flush=True)
        serve(application(step, world, port, word), listener)


def _starts(config: Config | None, step: Step, folder: Path) -> World:
    """What lies beside the checkpoint, else what the project has. Raises `UserError` without either."""
    if (folder / WORLD).is_file():
        return read_world(folder / WORLD)
    if config is None:
        raise UserError(f"{PARAMS}: not found, which says what {folder} starts from; run in the project")
    world = find_world(config, step)
    if world is None:
        raise UserError(f"{config.store}: holds out no clip of {config.evaluate.length} frames to start from")
    return world


def serve(app: Starlette, listener: socket.socket) -> None:
    """Serve until a signal asks for the end."""
    settings = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        ws_max_size=1 << 20,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=PATIENCE,
    )
    uvicorn.Server(settings).run(sockets=[listener])


def application(step: Step, world: World, port: int, word: str) -> Starlette:
    """The page at `/<word>/`, and its steps over the WebSocket `/<word>/step`."""
    title, notes = describe(step)
    page = render(
        [Entry(title, notes, world, mark=digest(step))], None, socket=f"ws://{HOST}:{port}/{word}/step"
    )
    origins = {f"http://{name}:{port}" for name in (HOST, "localhost")}
    turn = asyncio.Lock()

    async def home(request: Request) -> HTMLResponse:
        return HTMLResponse(page, headers=HEADERS)

    async def steps(websocket: WebSocket) -> None:
        if websocket.headers.get("origin") not in origins:
            await websocket.close(1008)
            return
        await websocket.accept()
        seen: Seen = []
        try:
            while True:
                message = await websocket.receive_bytes()
                async with turn:
                    answer = await run_in_threadpool(respond, step, world, seen, message)
                await websocket.send_bytes(answer)
        except ValueError as error:
            await websocket.close(1008, str(error))
        except (WebSocketDisconnect, KeyError):  # a text is no bytes
            return

    return Starlette(
        routes=[Route(f"/{word}/", home), WebSocketRoute(f"/{word}/step", steps)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


@torch.no_grad()
def respond(step: Step, world: World, seen: Seen, message: bytes) -> bytes:
    """What is answered to a message, in little-endian float32: the classes (S), deter (D) and, after
    fine-tuning, reward, value and the policy's action, of a state.

    A picture's bytes and one more, a length that no step's message has, ask for the state that the model
    takes it for; `seen` then has its context. A step is asked for by 0, the clip's number, the classes (S),
    deter (D), the action (A) and the noise (S·K), and the answer ends with the picture's bytes; the number
    after the last clip's stands for the picture of before. Raises `ValueError` for any other message, and for
    numbers that are not finite or out of their range.
    """
    if len(message) == FRAME_BYTES + 1:
        frame = torch.frombuffer(bytearray(message[:-1]), dtype=torch.uint8).view(1, *FRAME)
        stoch, deter, *rest = Look(step)(frame)
        judged, seen[:] = rest[:3] if step.actor else [], [tuple(rest[3:] if step.actor else rest)]
        return _pack(stoch, deter, judged)
    spec = step.spec
    sizes = {"head": 2, "stoch": spec.stoch, "deter": spec.deter, "action": step.action_dim}
    sizes |= {"noise": spec.stoch * spec.discrete}
    if len(message) != 4 * sum(sizes.values()):
        raise ValueError("a message of another size")
    numbers = np.frombuffer(message, "<f4")
    if not np.isfinite(numbers).all():
        raise ValueError("numbers that are not finite")
    parts = np.split(numbers, np.cumsum(list(sizes.values()))[:-1])
    head, chosen, deter, action, noise = (torch.from_numpy(part.copy()) for part in parts)
    clips = len(world.arrays["frames"])
    clip = int(_whole(head, clips + len(seen))[1])
    one_hot = torch.nn.functional.one_hot(_whole(chosen, spec.discrete), spec.discrete).float()
    context = world.context(clip) if clip < clips else seen[0]
    stoch, deter, frame, *judged = step(
        one_hot[None], deter[None], action[None], noise.view(1, -1, spec.discrete), *context
    )
    return _pack(stoch, deter, judged) + frame.contiguous().numpy().tobytes()


def _whole(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers as integers. Raises `ValueError` where one is no whole number below `count`."""
    if not ((numbers >= 0) & (numbers < count) & (numbers == numbers.floor())).all():
        raise ValueError("a number out of its range")
    return numbers.long()


def _pack(stoch: torch.Tensor, deter: torch.Tensor, judged: Sequence[torch.Tensor]) -> bytes:
    found = [stoch.argmax(-1).float(), deter, *judged]
    return torch.cat([value.flatten() for value in found]).numpy().astype("<f4").tobytes()
