"""What a stage keeps: finished checkpoints, and snapshots from which an interrupted run goes on.

A checkpoint is a folder: `<part>.safetensors` for each part of a model, and `config.json`, which says what
they are. It appears under its name whole or not at all.

A snapshot is the state of an unfinished run after some step. Snapshots lie in `data/.resume/<key>/`, outside
every output that DVC tracks, or in the folder that `PRELAR_RESUME` names, for a run in a copy of the project
that does not outlive it. The key is a hash of the run's params, inputs and code, so that no run finds
another's; the folder is removed when its run completes, so that a finished run leaves nothing to resume.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from prelar.config import misfits
from prelar.utils.errors import UserError, one_line, remake, shown
from prelar.utils.files import RESUME, RESUME_FOLDER, atomic_file, parse_json, publish, read_bytes, remove

SCHEMA = 1
CONFIG_BYTES = 1 << 20
KINDS: dict[str, type] = {"stage": str, "model": dict, "imported": dict}

Weights = dict[str, Tensor]


def save_parts(folder: Path, parts: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]) -> None:
    """Write a checkpoint, replacing the one under that name.

    `parts` holds a state dict for each part; `config` is JSON, or dataclasses that become JSON: the model's
    spec, the stage, the step and whatever else describes it. Raises `UserError` where it cannot be written;
    the old checkpoint then stays.
    """
    staged = folder.with_name(f".{folder.name}.partial")
    try:
        remove(staged)
        staged.mkdir(parents=True)
        for name, weights in parts.items():
            whole = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
            (staged / f"{name}.safetensors").write_bytes(save(whole))
        content = {"schema": SCHEMA, "parts": sorted(parts), **config}
        (staged / "config.json").write_text(
            json.dumps(content, indent=2, sort_keys=True, default=asdict) + "\n", encoding="utf-8"
        )
        publish(staged, folder)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            remove(staged)
        raise UserError(
            f"{folder}: cannot be written ({_brief(error)}); free space or mend its permissions"
        ) from error


def load_config(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself. Raises `UserError` where none can be read here.

    `parts` are names of files in the folder. Where `model`, the keywords that build it, is there, it
    is a mapping of values that params.yaml could hold too, and `stage` is a text.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: no checkpoint; {remake(folder)}")
    try:
        config = parse_json(read_bytes(path, CONFIG_BYTES))
    except ValueError as error:
        raise UserError(f"{path}: unreadable ({error}); {remake(folder, anew=True)}") from None
    schema = config.get("schema") if isinstance(config, dict) else None
    if type(schema) is not int or schema < 1 or not _are_names(config.get("parts")):
        raise UserError(f"{path}: not a checkpoint's description; {remake(folder, anew=True)}")
    if schema > SCHEMA:
        raise UserError(
            f"{path}: schema {shown(schema)} is newer than {SCHEMA}, the newest known here; update prelar"
        )
    for name, kind in KINDS.items():
        if not isinstance(config.get(name, kind()), kind):
            raise UserError(f"{path}: {name} = {shown(config[name])} is none; {remake(folder)}")
    if problem := misfits(config.get("model", {})):
        raise UserError(f"{path}: model.{problem}; {remake(folder)}")
    return config


def _are_names(parts: object) -> bool:
    """Whether the parts that a checkpoint lists are names of different files."""
    if not isinstance(parts, list) or not all(isinstance(name, str) for name in parts):
        return False
    return len(set(parts)) == len(parts) and all(name.isidentifier() and len(name) < 100 for name in parts)


def load_parts(folder: Path, names: Iterable[str] | None = None) -> tuple[dict[str, Weights], dict[str, Any]]:
    """Read the parts of a checkpoint, all or those named, onto the CPU, and its config.

    Raises `UserError` for a missing folder or part, an unreadable file, numbers that are not finite, and a
    newer schema.
    """
    config = load_config(folder)
    parts = {}
    for name in config["parts"] if names is None else names:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            present = ", ".join(config["parts"]) or "none"
            raise UserError(f"{folder}: part {name} is missing (it lists: {present}); {remake(folder)}")
        try:
            if not path.is_file():
                raise ValueError("not a regular file")
            parts[name] = load_file(path)
            check_finite(parts[name])
        except Exception as error:  # safetensors raises many kinds for a damaged file
            raise UserError(f"{path}: unreadable ({_brief(error)}); {remake(folder, anew=True)}") from None
    return parts, config


def check_finite(weights: Weights) -> None:
    """Raise `ValueError` that names the first tensor of floats that are not all finite in float32."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise ValueError(f"{name} has numbers that are not finite")


def resume_key(stage: str, fingerprint: str, *, known: Mapping[str, Any], inputs: Iterable[Path]) -> str:
    """Name of the folder in which this very run keeps its snapshots.

    `fingerprint` stands for the stage's params and code, see `prelar.stages`; `known` is what else the run
    depends on; `inputs` are files, or folders of files, hashed whole (of a store, name the small files that
    identify it).
    """
    digest = hashlib.sha256()
    digest.update(
        json.dumps([stage, torch.__version__, fingerprint, dict(known)], sort_keys=True, default=str).encode()
    )
    for path in inputs:
        for file in [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file()):
            digest.update(f"\0{file}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
    return f"{stage}-{digest.hexdigest()[:16]}"


class Snapshots:
    """The snapshots of one run, of which the last `keep` are kept.

    `folder` may also hold files of the run that are too large to copy into each snapshot, such as a replay
    buffer; their owner cuts them back to the snapshot that is resumed.
    """

    def __init__(self, key: str, *, root: Path | None = None, keep: int = 2) -> None:
        self.folder = (root or Path(os.environ.get(RESUME_FOLDER) or RESUME)) / key
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._pending: Future[None] | None = None

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The step of the newest readable snapshot and its state, on the CPU; None where there is none.

        What a killed process left half-written is removed; an unreadable snapshot is named and passed over.
        """
        for partial in self.folder.glob(".*.partial"):
            remove(partial)
        for path in reversed(self._paths()):
            try:
                return self._step(path), torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch.load raises many kinds for a damaged file
                print(f"{path}: unreadable ({_brief(error)}); passed over", file=sys.stderr)
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The state after `step`, which another process of the run has read too. Raises `UserError`."""
        path = self._path(step)
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise UserError(
                f"{path}: unreadable ({_brief(error)}); give all machines the same folder"
            ) from None
        return state

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep the state after `step`: nested dicts, lists and tuples of tensors, numbers and texts.

        Tensors are copied before this returns; the file is written in the background. An error of the write
        before is raised here, as `UserError`.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, step, _copy(state))

    def wait(self) -> None:
        """Wait for the write under way. Raises `UserError` where it failed; earlier snapshots then stay."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{self.folder}: no snapshot could be written ({_brief(error)}); free space"
                ) from error

    def settle(self) -> None:
        """Wait for the write under way, whatever comes of it: a run that fails leaves no half of a file."""
        if self._pending is not None:
            self._pending.exception()

    def remove(self) -> None:
        """Remove everything that this run could resume from, and runs of its stage that never ended.

        Call it when the outputs are published.
        """
        self.wait()
        stage = self.folder.name.rpartition("-")[0]
        for path in [self.folder, *(self.folder.parent.glob(f"{stage}-*") if stage else ())]:
            remove(path)

    def _write(self, step: int, state: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._path(step)) as partial:
            torch.save(state, partial)
        for path in self._paths()[: -self._keep]:
            path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.pt"

    def _paths(self) -> list[Path]:
        """Snapshots, oldest first."""
        return sorted(self.folder.glob("step-*.pt"), key=self._step)

    @staticmethod
    def _step(path: Path) -> int:
        return int(path.stem.removeprefix("step-"))


def _copy(state: Any) -> Any:
    """Nested containers with every tensor copied to the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy(value) for value in state)
    return state


def _brief(error: BaseException) -> str:
    """The first line of an error, without the path that the caller names."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)[:200]
