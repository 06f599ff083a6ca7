"""DVC remotes that docs/scaling-out.md names: what one clone pushes, another pulls, run by run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import asyncssh
import pytest

from tests.bucket import bucket
from tests.flows.toy_pipeline import Toy, make_toy

USER, PASSWORD = "tests", "hush-hush-hush"


class _Login(asyncssh.SSHServer):
    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, PASSWORD)


@contextmanager
def ssh() -> Iterator[str]:
    """Yield the URL of an SFTP server on loopback."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def listen() -> asyncssh.SSHAcceptor:
        key = asyncssh.generate_private_key("ssh-ed25519")
        return await asyncssh.create_server(
            _Login, "127.0.0.1", 0, server_host_keys=[key], sftp_factory=True, allow_scp=False
        )

    try:
        server = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
        yield f"ssh://{USER}@127.0.0.1:{server.get_port()}"
        loop.call_soon_threadsafe(server.close)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def add_remote(toy: Toy, url: str) -> None:
    toy.command("dvc", "remote", "add", "--local", "--default", "shared", url)
    if url.startswith("ssh"):
        toy.command("dvc", "remote", "modify", "--local", "shared", "password", PASSWORD)


@pytest.mark.long
@pytest.mark.parametrize("server", [bucket, ssh])
def test_what_is_pushed_is_pulled(server: Callable[[], AbstractContextManager[str]], tmp_path: Path) -> None:
    toy = make_toy(tmp_path)
    toy.command("dvc", "repro")
    toy.command("git", "commit", "-qam", "Run")
    with server() as place:
        url = f"{place}{tmp_path}/remote" if place.startswith("ssh") else f"{place}/remote"
        add_remote(toy, url)
        toy.command("dvc", "exp", "run", "--name", "other", "-S", "seed=7")
        toy.command("dvc", "push", "--run-cache")
        toy.command("dvc", "exp", "push", ".", "other")
        toy.command("git", "checkout", "-q", ".")
        toy.command("git", "clone", "-q", str(toy.root), str(tmp_path / "clone"))
        clone = replace(toy, root=tmp_path / "clone")
        add_remote(clone, url)
        clone.command("dvc", "exp", "pull", "origin", "other")
        clone.command("dvc", "exp", "apply", "other")
        toy.command("dvc", "exp", "apply", "other")
        assert outputs(clone) == outputs(toy) != {}
        ran = toy.ran("pretrain")
        clone.command("dvc", "pull", "--run-cache")
        clone.command("dvc", "repro")
        assert toy.ran("pretrain") == ran, "the other clone's run is known"


def outputs(toy: Toy) -> dict[str, bytes]:
    """What the stages left in data/."""
    folder = toy.root / "data"
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if name.parts[0] != ".resume"}
