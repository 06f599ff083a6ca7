"""`python -m prelar doctor`: what this machine has, in a line each, with the remedy for what it lacks."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from prelar import pretrain
from prelar.config import SSV2_CLIPS, Config, load_config
from prelar.envs import gl
from prelar.report.provenance import WRITTEN_BY_RUNS, redact
from prelar.utils import disk
from prelar.utils.errors import UserError
from prelar.utils.frames import FRAME_BYTES

STEP_BYTES = FRAME_BYTES + 64
WEIGHT_BYTES = 4
SNAPSHOTS = 3
"""Snapshots on the disk at once: two that are kept and one that is being written."""
LONGEST = 1000
"""Steps of an episode that the task decides on."""
ADAM = 3
"""Numbers that a snapshot holds for each weight: the weight and Adam's two moments."""


def check_stage(stage: str, config: Config) -> None:
    """Raise `UserError` where there is clearly too little room for what a training stage is to write."""
    needed = estimates(config).get(stage)
    if needed:
        disk.require(Path("data") / stage, needed, f"{stage} at scale {config.scale}")


def estimates(config: Config) -> Mapping[str, int]:
    """Bytes that each stage is to write at most at once, for stages that write much.

    Data sets are left out: only their source tells how large they are.
    """
    model = weights(config) * WEIGHT_BYTES
    preset = config.finetune
    steps = min(preset.replay, preset.env_steps) // (preset.action_repeat or 1)
    steps += 3 * (preset.checkpoint_every + (preset.time_limit or LONGEST))
    return {
        "pretrain": SNAPSHOTS * ADAM * model + model,
        "finetune": SNAPSHOTS * ADAM * 2 * model + steps * STEP_BYTES,
    }


def weights(config: Config) -> int:
    """Weights of the world model that the parameters ask for; it is built without memory for them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return sum(weight.numel() for weight in pretrain.build(config).parameters())


State = Literal["ok", "note", "MISSING"]
PYTHON = ((3, 11), (3, 14))
LOCK = Path("requirements.lock")
SERVER = "http://127.0.0.1:4200/api"
SHOWN = 4
TIMEOUT = 60


@dataclass(frozen=True)
class Finding:
    """One line: ok; a note, where something is absent that this project does without; or what is missing."""

    name: str
    state: State
    text: str


def run() -> int:
    """Print a line for each examination; returns the exit status, 1 where something needed is missing."""
    findings = []
    for finding in examine():
        findings.append(finding)
        print(f"{finding.state:8}{finding.name:13}{finding.text}", flush=True)
    return int(any(finding.state == "MISSING" for finding in findings))


def examine() -> Iterator[Finding]:
    """The findings, one after the other, for they take their time."""
    yield python()
    yield packages(LOCK)
    config: Config | None = None
    try:
        config = load_config()
        yield Finding("params.yaml", "ok", f"valid; scale {config.scale}, method {config.method}")
    except UserError as error:
        yield Finding("params.yaml", "MISSING", str(error))
    yield guarded("ffmpeg", lambda: ffmpeg(config.ssv2.ffmpeg if config else None))
    yield guarded("OpenGL", opengl)
    yield guarded("GPU", lambda: gpu(config.device if config else "auto"))
    yield compiler(config.compile if config else "auto")
    if config:
        yield guarded("disk", lambda: disk_space(config))
    yield git()
    yield dvc()
    yield guarded("Prefect", lambda: prefect(os.environ.get("PREFECT_API_URL") or SERVER))
    yield coppeliasim(needed=config is not None and config.demos.source == "rlbench")


def guarded(name: str, examination: Callable[[], Finding]) -> Finding:
    """The finding of an examination; what it ends with is what is missing."""
    try:
        return examination()
    except (UserError, ImportError, OSError, ValueError) as error:
        return Finding(name, "MISSING", str(error))


def python() -> Finding:
    """The version of Python, against the versions that are supported."""
    version = ".".join(map(str, sys.version_info[:3]))
    if PYTHON[0] <= sys.version_info[:2] < PYTHON[1]:
        return Finding("Python", "ok", f"{version}, {sys.executable}")
    return Finding("Python", "MISSING", f"{version}; install 3.11 to 3.13 and run `make setup PYTHON=…`")


def packages(lock: Path) -> Finding:
    """The installed versions against those of requirements.lock."""
    try:
        lines = lock.read_text(encoding="utf-8").splitlines()
    except OSError:
        return Finding("packages", "MISSING", f"{lock}: no such file; run from the top of the project")
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [one for one in wanted if one.marker is None or one.marker.evaluate()]
    installed = {one.name: _version(one.name) for one in here}
    absent = [name for name, version in installed.items() if version is None]
    if absent:
        return Finding("packages", "MISSING", f"{_some(absent)} not installed; run `make setup`")
    others = [
        f"{one.name} {version}, not {str(one.specifier).removeprefix('==')}"
        for one in here
        if (version := installed[one.name]) and not one.specifier.contains(version, prereleases=True)
    ]
    if others:
        return Finding("packages", "note", f"{_some(others)}; `make setup` installs those of {lock}")
    return Finding("packages", "ok", f"{len(here)} as in {lock}")


def ffmpeg(path: str | None) -> Finding:
    """The ffmpeg that decodes clips."""
    from prelar.videos.decode import Decoder

    decoder = Decoder(path)
    return Finding("ffmpeg", "ok", f"{decoder.version}, {decoder.path}")


def opengl() -> Finding:
    """The OpenGL that draws Meta-World; it draws one frame."""
    backend = gl.ensure()
    return Finding("OpenGL", "ok", f"{backend} drew a frame with {gl.probe(backend)}")


def gpu(device: str) -> Finding:
    """The graphics cards that torch sees."""
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
        detail = ", ".join(f"{card.name} ({disk.format_bytes(card.total_memory)})" for card in cards)
        return Finding("GPU", "ok", detail)
    if device == "cuda":
        return Finding("GPU", "MISSING", "torch sees none; set device to auto, or install a driver for CUDA")
    return Finding("GPU", "note", "torch sees none; training runs on the CPU")


def compiler(choice: str) -> Finding:
    """Whether a C++ compiler is there for torch.compile, which asks `CXX` and Python's headers."""
    name, headers = os.environ.get("CXX") or "g++", sysconfig.get_path("include")
    source = "#include <vector>\n#include <Python.h>\n"
    words = [name, "-x", "c++", "-fsyntax-only", f"-I{headers}", "-"]
    try:
        done = subprocess.run(
            words, input=source, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        detail = "" if done.returncode == 0 else f"{name} compiles nothing that includes Python.h"
    except (OSError, subprocess.TimeoutExpired):
        detail = f"{name}: no such compiler"
    if not detail:
        return Finding("compiler", "ok", f"{name}, for torch.compile")
    remedy = "install g++ and Python's headers (`apt-get install g++ python3-dev`)"
    if choice in ("always", "graphs"):
        return Finding("compiler", "MISSING", f"{detail}; {remedy}, or set compile to never")
    return Finding("compiler", "note", f"{detail}; {remedy} for torch.compile, without which steps are plain")


def disk_space(config: Config) -> Finding:
    """Free room against what the training stages of the current parameters write."""
    free, needed = disk.free_bytes(Path("data")), sum(estimates(config).values())
    detail = (
        f"{disk.format_bytes(free)} free; pretrain and finetune at scale {config.scale} take about "
        f"{disk.format_bytes(needed)}, Something-Something V2 whole "
        f"{disk.format_bytes(disk.archive_bytes(SSV2_CLIPS, None))}"
    )
    if free < needed:
        return Finding("disk", "MISSING", f"{detail}; free space, or put the project on a larger disk")
    return Finding("disk", "ok", detail)


def git() -> Finding:
    """The state of the git repository, which experiments start from."""
    commit = _told("git", "rev-parse", "--short", "HEAD")
    if commit is None:
        return Finding("git", "MISSING", "no repository with a commit here; clone the project, or `git init`")
    changed = [
        line[3:]
        for line in (_told("git", "status", "--porcelain", "--untracked-files=no") or "").splitlines()
        if line[3:] not in WRITTEN_BY_RUNS
    ]
    if changed:
        return Finding("git", "note", f"{commit}, changed: {_some(changed)}; experiments carry that along")
    return Finding("git", "ok", f"{commit}, clean")


def dvc() -> Finding:
    """The state of DVC."""
    version = _version("dvc")
    if version is None:
        return Finding("DVC", "MISSING", "not installed; run `make setup`")
    if not Path(".dvc/config").is_file():
        return Finding("DVC", "MISSING", f"{version}, no .dvc here; run from the top of the project")
    ran = "stages have run" if Path("dvc.lock").is_file() else "no stage has run yet; `make repro` runs them"
    return Finding("DVC", "ok", f"{version}, {ran}")


def prefect(url: str) -> Finding:
    """Whether a Prefect server answers; flows start one of their own where none does."""
    import httpx

    try:
        answered = httpx.get(f"{url.rstrip('/')}/health", timeout=5).is_success
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError):
        answered = False
    if answered:
        return Finding("Prefect", "ok", f"a server answers at {redact(url)}")
    detail = f"no server at {redact(url)}; `make ui` starts one, and flows do without"
    return Finding("Prefect", "note", detail)


def coppeliasim(*, needed: bool) -> Finding:
    """Whether live RLBench demonstrations are possible."""
    from prelar.demos import rlbench_live

    try:
        rlbench_live.check()
    except UserError as error:
        return Finding("CoppeliaSim", "MISSING" if needed else "note", str(error))
    return Finding("CoppeliaSim", "ok", f"{os.environ.get('COPPELIASIM_ROOT')}, with RLBench")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _some(names: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _told(*command: str) -> str | None:
    """What a command prints, None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None
