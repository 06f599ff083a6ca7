"""Mutates good files and has them read: `python -m tests.fuzz FORMAT,… SECONDS [SEED]`.

The law: a bad file is refused by its reader's own kind of error, in bounded time and memory. A seed makes the
same file each time; the last one tried stands in the standard output, and its file in the folder named there.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import tokenize
import traceback
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prelar.utils.errors import UserError
from tests.conftest import ROOT

ROOM = 1 << 30
LIMIT = 30
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan")),
    *("", "x", "..", "../..", "\x00", "\x1b[2J", "x" * 10_000, "\u202e", "9" * 5000),
    *([], {}, [[]], [1] * 1000, {"x": 1}, json.loads("[" * 60 + "]" * 60)),
)
WORDS = (
    b"[",
    b"]",
    b"{",
    b"}",
    b"\x00",
    b"\xff",
    b"&a ",
    b"*a",
    b"<<: ",
    b"- ",
    b": ",
    b"\n",
    b'"',
    b"9" * 400,
)


@dataclass(frozen=True)
class Format:
    """A good file, how one is read, and what the reader may raise. `of_json`: its values are changed too."""

    good: bytes
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = (UserError,)
    of_json: bool = False
    wrap: Callable[[bytes], bytes] = bytes


def mutated(form: Format, seed: int) -> bytes:
    """The good file with a few changes."""
    draw = random.Random(seed)
    content = form.good
    if form.of_json and draw.random() < 0.6:
        held = json.loads(content)
        for _ in range(draw.randint(1, 2)):
            held = replaced(held, draw)
        return form.wrap(json.dumps(held).encode())
    held = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        change(held, draw)
    return form.wrap(bytes(held))


def replaced(held: Any, draw: random.Random) -> Any:
    """A value of JSON in which a part, at random, is another one, is gone or has another name."""
    if not isinstance(held, dict | list) or not held or draw.random() < 0.15:
        return draw.choice(ODD)
    made = dict(held) if isinstance(held, dict) else list(held)
    key = draw.choice(list(made)) if isinstance(made, dict) else draw.randrange(len(made))
    action = draw.random()
    if action < 0.1:
        made.pop(key)
    elif action < 0.15 and isinstance(made, dict):
        made[str(draw.choice(ODD))[:300]] = made.pop(key)
    else:
        made[key] = replaced(made[key], draw)
    return made


def change(held: bytearray, draw: random.Random) -> None:
    """Change bytes in place: bits, numbers, words; cut, repeated, moved and inserted runs."""
    at = draw.randrange(len(held) + 1)
    if draw.random() < 0.3:  # headers are where lengths are
        at = min(at, draw.randrange(64))
    size = draw.choice((1, 2, 4, 8, 64, 1000))
    match draw.randrange(8):
        case 0 if at < len(held):
            held[at] ^= 1 << draw.randrange(8)
        case 1 if at < len(held):
            held[at] = draw.randrange(256)
        case 2:
            width, order = draw.choice((1, 2, 4, 8)), draw.choice(("little", "big"))
            held[at : at + width] = (draw.choice(NUMBERS) % 256**width).to_bytes(width, order)  # type: ignore[arg-type]
        case 3:
            del held[at : at + size]
        case 4:
            held[at:at] = held[at : at + size] * draw.choice((1, 2, 50))
        case 5:
            held[at:at] = draw.choice(WORDS) * draw.choice((1, 1, 100))
        case 6:
            other = draw.randrange(len(held) + 1)
            held[at : at + size] = held[other : other + size]
        case _ if draw.random() < 0.3:
            del held[at:]


# --- The formats ------------------------------------------------------------------------------------------


def to_file(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """A reader of bytes that writes them to a file first."""

    def reads(content: bytes) -> object:
        path.write_bytes(content)
        return read()

    return reads


def archive(place: Path) -> Format:
    """A tar, compressed after it is changed."""
    from prelar.videos.archive import archive_members, find_pieces

    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"20bn-something-something-v2/{number}.webm")
            info.size = 600
            tar.addfile(info, io.BytesIO(b"\x1aE\xdf\xa3" + bytes(596)))
    path = place / "20bn-something-something-v2-00"

    def read() -> object:
        return [member.content for member in archive_members(find_pieces([path]))]

    return Format(held.getvalue(), to_file(path, read), wrap=lambda content: gzip.compress(content, 1))


def archive_head(place: Path) -> Format:
    """A compressed tar, changed as it is."""
    form = archive(place)
    return Format(gzip.compress(form.good, 0, mtime=0), form.read)


def labels(place: Path) -> Format:
    """A split of the labels, beside good ones."""
    from prelar.videos.labels import read_labels
    from tests.archives import labels_files

    made = labels_files([str(number) for number in range(16)])
    for name, content in made.items():
        (place / name).write_bytes(content)
    read = to_file(place / "train.json", lambda: read_labels(place))
    return Format(made["train.json"], read, of_json=True)


def labels_zip(place: Path) -> Format:
    """The zip of the labels."""
    from prelar.videos.labels import read_labels
    from tests.archives import labels_files

    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in labels_files(["1", "2", "3", "4", "5", "6", "7", "8"]).items():
            made.writestr(name, content)
    path = place / "labels.zip"
    return Format(held.getvalue(), to_file(path, lambda: read_labels(path)))


def webm(place: Path) -> Format:
    """A clip, of which the structure is read; nothing is refused by an error."""
    from prelar.videos import webm as reader
    from tests.archives import clip

    return Format(clip(), lambda content: (reader.header(content), reader.packets(content)), ())


def npz(place: Path) -> Format:
    """An episode, stored without compression, so that headers can be changed."""
    from prelar.demos.apv_npz import read_npz
    from prelar.utils import zips

    held = io.BytesIO()
    np.savez(held, image=np.zeros((3, 64, 64, 3), np.uint8), action=np.zeros((3, 4), np.float32))
    path = place / "a-v0-e0-front-3.npz"
    refusals = (*zips.ERRORS, tokenize.TokenError)  # the last of numpy, of a header without an end
    return Format(held.getvalue(), to_file(path, lambda: read_npz(path)), refusals)


def demonstration(place: Path) -> Format:
    """RLBench's pickle of an episode."""
    from prelar.demos.rlbench_folder import read_low_dim

    kinds = {}
    for module, name in (("rlbench.demo", "Demo"), ("rlbench.backend.observation", "Observation")):
        for part in ("rlbench", "rlbench.backend", module):
            sys.modules.setdefault(part, types.ModuleType(part))
        kinds[name] = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, kinds[name])
    held, steps = kinds["Demo"](), [kinds["Observation"]() for _ in range(3)]
    for step in steps:
        step.joint_velocities, step.gripper_pose = np.arange(7.0), np.array([0.0, 0, 0, 0, 0, 0, 1])
        step.gripper_open = 1.0
    held._observations = steps
    path = place / "low_dim_obs.pkl"
    return Format(pickle.dumps(held, 4), to_file(path, lambda: read_low_dim(path)), (ValueError,))


def png(place: Path) -> Format:
    """A picture of an episode."""
    from prelar.demos.rlbench_folder import read_pictures

    held = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(held, "PNG")
    return Format(held.getvalue(), to_file(place / "0.png", lambda: read_pictures(place, 1)), (ValueError,))


def a_store(place: Path) -> Path:
    from prelar.store.writer import StoreWriter

    with StoreWriter(place / "x.zarr", arrays={"actions": 2}) as writer:
        for number in range(4):
            frames, actions = np.full((5, 64, 64, 3), number, np.uint8), np.zeros((5, 2), np.float32)
            writer.append(frames, {"id": f"clip {number}", "split": "train", "label": "a"}, actions=actions)
        writer.append(None, {"id": "bad", "reason": "not a video"})
        writer.finish({})
    return place / "x.zarr"


def opened(path: Path) -> object:
    """Open a store, and use all that training and reports use of it."""
    from prelar.store.store import Store

    store = Store.open(path)
    held = [
        store.read(int(start), int(size))
        for start, size in zip(store.clip_start, store.clip_length, strict=True)
    ]
    return held, store.clips("train", "a"), store.index.to_pylist(), store.pairs, store.array("actions")


def index(place: Path) -> Format:
    """The index of a store, which has its sha256."""
    path, known = a_store(place), json.loads((place / "x.zarr/zarr.json").read_text())

    def read() -> object:
        known["attributes"]["index_sha256"] = hashlib.sha256((place / "x.parquet").read_bytes()).hexdigest()
        (path / "zarr.json").write_text(json.dumps(known))
        return opened(path)

    return Format((place / "x.parquet").read_bytes(), to_file(place / "x.parquet", read))


def metadata(place: Path, array: str = "frames") -> Format:
    """The zarr.json of an array."""
    path = a_store(place)
    file = path / array / "zarr.json"
    return Format(file.read_bytes(), to_file(file, lambda: opened(path)), of_json=True)


def attributes(place: Path) -> Format:
    """The zarr.json of a store."""
    return metadata(place, "")


def numbers(place: Path) -> Format:
    """The starts of the clips of a store."""
    path = a_store(place)
    file = path / "clip_start/c/0"
    return Format(file.read_bytes(), to_file(file, lambda: opened(path)))


def pointer(place: Path) -> Format:
    """A pointer to a published store."""
    from prelar.store.remote import publish

    path = a_store(place)
    made = publish(str(place / "shared"), path, place / "x.parquet")
    (place / "p.zarr").mkdir()
    file = place / "p.zarr/pointer.json"
    return Format(json.dumps(made).encode(), to_file(file, lambda: opened(place / "p.zarr")), of_json=True)


def manifest(place: Path) -> Format:
    """The manifest of a published store, whose pointer has its sha256."""
    made = json.loads(pointer(place).good)
    file = Path(made["url"]) / "manifest.json"

    def read() -> object:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (place / "p.zarr/pointer.json").write_text(json.dumps(made | {"manifest_sha256": digest}))
        return opened(place / "p.zarr")

    return Format(file.read_bytes(), to_file(file, read), of_json=True)


def a_checkpoint(place: Path) -> Path:
    from prelar.methods import build_model
    from prelar.model.spec import ModelSpec
    from prelar.train.checkpoint import save_parts

    sizes = {"cnn_depth": 2, "hidden": 4, "deter": 4, "stoch": 2, "discrete": 2, "action_dim": 4}
    model = build_model(ModelSpec(method="prelar", **sizes))
    save_parts(place / "pretrain", model.state(), {"stage": "pretrain", "model": model.spec, "step": 0})
    return place / "pretrain"


def description(place: Path) -> Format:
    """The config.json of a checkpoint."""
    import prelar

    file = a_checkpoint(place) / "config.json"
    return Format(file.read_bytes(), to_file(file, lambda: prelar.load(file.parent)), of_json=True)


def weights(place: Path) -> Format:
    """A part of a checkpoint: its header, changed as JSON or in its bytes."""
    import prelar

    file = a_checkpoint(place) / "action.safetensors"
    whole = file.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header, data = whole[8 : 8 + size], whole[8 + size :]
    read = to_file(file, lambda: prelar.load(file.parent))
    return Format(header, read, of_json=True, wrap=lambda told: struct.pack("<Q", len(told)) + told + data)


def safetensors(place: Path) -> Format:
    """A part of a checkpoint, changed as it is."""
    form = weights(place)
    return Format(form.wrap(form.good), form.read)


def published(place: Path, zipped: bool = True) -> Format:
    """A published checkpoint."""
    import torch

    from prelar.import_reference import read_weights

    path = place / "a.pt"
    held = {"step": 1, "model": {"w": torch.ones(3, 4), "b": torch.ones(3)}}
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    return Format(path.read_bytes(), to_file(path, lambda: read_weights(path)))


def published_old(place: Path) -> Format:
    """A published checkpoint as torch saved it before 1.6."""
    return published(place, zipped=False)


def published_pickle(place: Path) -> Format:
    """The pickle in a published checkpoint, packed after it is changed."""
    form = published(place)
    with zipfile.ZipFile(io.BytesIO(form.good)) as good:
        records = {name: good.read(name) for name in good.namelist()}

    def packed(content: bytes) -> bytes:
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as made:
            for name, record in {**records, "a/data.pkl": content}.items():
                made.writestr(name, record)
        return held.getvalue()

    return Format(records["a/data.pkl"], form.read, wrap=packed)


def params(place: Path) -> Format:
    """params.yaml."""
    from prelar.envs.names import checked_config

    path = place / "params.yaml"
    return Format((ROOT / "params.yaml").read_bytes(), to_file(path, lambda: checked_config(path)))


FORMATS: dict[str, Callable[[Path], Format]] = {
    make.__name__: make
    for make in (
        *(archive, archive_head, labels, labels_zip, webm, npz, demonstration, png, index, metadata),
        *(attributes, numbers, pointer, manifest, description, weights, safetensors, published, params),
        *(published_old, published_pickle),
    )
}


# --- The run ----------------------------------------------------------------------------------------------


def run(name: str, seconds: float, seed: int) -> None:
    """Read mutations from `seed` on for some seconds, and until one of the first hundred was refused.

    Whatever is against the law ends the process.
    """
    place = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    form = FORMATS[name](place)
    form.read(form.wrap(form.good))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
    end, first, refused = time.monotonic() + seconds, seed, 0
    while time.monotonic() < end or (refused == 0 and seed < first + 100):
        print(f"{name} {seed} in {place}", flush=True)
        signal.alarm(LIMIT)
        try:
            form.read(mutated(form, seed))
        except form.refusals as error:
            assert len(str(error)) < 5000 or not isinstance(error, UserError), "a message without end"
            refused += 1
        signal.alarm(0)
        seed += 1
    shutil.rmtree(place)
    print(f"ok {name}: {seed - first} files, {refused} of them refused", flush=True)
    os._exit(0)  # some libraries' threads take a while to end


def run_each(names: list[str], seconds: float, seed: int) -> int:
    """Run formats one after the other, each in a fork of this process; the number of those that failed."""
    import prelar.import_reference  # noqa: F401  what most of them need, once for all

    failed = 0
    for name in names:
        pid = os.fork()
        if pid == 0:
            try:
                run(name, seconds, seed)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(f"{name}: status {status}", file=sys.stderr, flush=True)
        failed += status != 0
    return failed


if __name__ == "__main__":
    sys.exit(
        run_each(sys.argv[1].split(","), float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    )
