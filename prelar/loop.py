"""The one training loop: steps, logs, progress, snapshots and signals. It takes functions for all the rest.

What happens in a step is a function of (seed, step) and of the state that snapshots hold: torch's global
generator is seeded anew before every step, so no generator's state needs keeping. A run that was killed and
resumed therefore ends with the same weights and the same log, byte for byte on a CPU, as one that was not.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from dvclive import Live
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from prelar.checkpoint import Snapshots
from prelar.errors import UserError
from prelar.files import remove, write_text
from prelar.seeds import Stream, seed_torch

ADAM_EPS = 1e-5
WEIGHT_DECAY = 1e-6
CLIP_NORM = 100.0
SUMMARY = "metrics.json"
STDERR = 2
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}

Scalars = Mapping[str, Tensor | float]


class Stateful(Protocol):
    """Anything whose state a snapshot holds: a module, an optimiser, counters, a replay buffer."""

    def state_dict(self) -> Any:
        """Nested dicts, lists and tuples of tensors, numbers and texts."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Put back what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class Hook:
    """Work between steps: `run(step)` after every multiple of `every` steps, and once at the end of the run.

    It may return scalars, which are logged at that step as they are. It must not change what training sees.
    Only what it returns is kept when a run is resumed, not the files it writes: let the last call write them.
    """

    every: int
    run: Callable[[int], Scalars | None]


def set_up(*, device: str, precision: str, threads: int) -> Fabric:
    """Settle device, precision, CPU threads and determinism for this process, and return its Fabric.

    `device` is auto, cpu or cuda; `precision` is fp32 or bf16 (mixed). On a CPU only deterministic algorithms
    are allowed. Raises `UserError` where the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = cuda: no CUDA device answers; set device to cpu or auto")
    accelerator = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(accelerator == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    fabric = Fabric(accelerator=accelerator, devices=1, precision=PRECISIONS[precision])  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def adam(groups: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float) -> Adam:
    """Adam as the methods use it, over parameters or parameter groups."""
    return Adam(groups, lr=lr, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY, fused=True)


def descend(fabric: Fabric, module: nn.Module, optimizer: Optimizer, loss: Tensor) -> Tensor:
    """One clipped step down the gradient of `loss`; returns the norm of the gradient before clipping, 0-d."""
    optimizer.zero_grad(set_to_none=True)
    fabric.backward(loss)
    norm = fabric.clip_gradients(module, optimizer, max_norm=CLIP_NORM, error_if_nonfinite=False)
    optimizer.step()
    assert norm is not None
    return norm.detach()


def seed_step(seed: int, step: int, rank: int = 0, *, hook: bool = False) -> None:
    """Seed torch's global generator as a function of the arguments: for a step, or for the hooks after it."""
    seed_torch(Stream.HOOK if hook else Stream.STEP, seed, step, rank)


class MetricLog:
    """Scalars by step, written by DVCLive: `metrics.json` and `plots/metrics/<name>.tsv`, without times.

    What the folder held before is removed; `content` puts back the log of the run that is resumed. The log is
    kept in memory as well and never read from the disk again, so that it stays whole where somebody removes
    the folder while the run goes on, as DVC does before it starts a stage.
    """

    def __init__(self, folder: Path, content: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._texts = dict(content or {})
        remove(folder)
        folder.mkdir(parents=True)
        self.write()
        self._live = Live(
            str(folder), resume=True, dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row for each value, to six significant digits."""
        if not (self.folder / SUMMARY).exists():
            self.write()
        self._live.step = step
        for name, value in values.items():
            rounded = float(f"{value:.6g}")
            self._live.log_metric(name, rounded)
            path = f"plots/metrics/{name}.tsv"
            before = self._texts.get(path, f"step\t{name.rpartition('/')[2]}\n")
            self._texts[path] = f"{before}{step}\t{rounded}\n"
        self._live.make_summary()
        self._texts[SUMMARY] = json.dumps(self._live.summary, indent=4) + "\n"

    def content(self) -> dict[str, str]:
        """The text of every file of the log, by its path in the folder."""
        return dict(self._texts)

    def write(self) -> None:
        """Write every file anew, whatever became of it on the disk."""
        for name, text in self._texts.items():
            write_text(self.folder / name, text)


class Averages:
    """Means of scalars between two rows of the log, and the guard that stops at the first that is not finite.

    Values stay on their device until `flush`, so that adding them does not wait for it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pending: list[tuple[int, dict[str, Tensor | float]]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, step: int, values: Scalars) -> None:
        """Take the values of one step."""
        if values:
            self._pending.append((step, dict(values)))

    def flush(self) -> None:
        """Fetch what is pending. Raises `UserError` that names step and value where one is not finite."""
        tensors = [v for _, row in self._pending for v in row.values() if isinstance(v, Tensor)]
        fetched = iter(torch.stack([t.detach().float() for t in tensors]).tolist() if tensors else [])
        pending, self._pending = self._pending, []
        for step, row in pending:
            for key, value in row.items():
                number = next(fetched) if isinstance(value, Tensor) else float(value)
                if not math.isfinite(number):
                    raise UserError(f"{self._name}: {key} = {number} at step {step}; lower the learning rate")
                self._sums[key] = self._sums.get(key, 0.0) + number
                self._counts[key] = self._counts.get(key, 0) + 1

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        self.flush()
        means = {key: total / self._counts[key] for key, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts so far."""
        self.flush()
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])


class Interrupts:
    """While entered, SIGTERM and Ctrl-C only leave a note, so that the step under way can end.

    A second signal ends the process at once, as it would have without this; Ctrl-C says so. `name` is the
    run's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if number == signal.SIGINT:
            told = f"\n{self.name}: finishing the step under way to keep it; Ctrl-C again stops at once\n"
            os.write(STDERR, told.encode())  # print is not safe within a signal handler

    def leave(self) -> None:
        """End the run as the signal asks: exit status 143 after SIGTERM, 130 after Ctrl-C."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signal.SIGTERM)


def train(
    step: Callable[[int], Scalars],
    *,
    name: str,
    steps: int,
    seed: int,
    state: Mapping[str, Stateful],
    snapshots: Snapshots,
    snapshot_every: int,
    log_folder: Path,
    log_every: int,
    hooks: Sequence[Hook] = (),
    device: torch.device | str = "cpu",
    rank: int = 0,
) -> None:
    """Run `step(0)`, …, `step(steps - 1)`, or go on from the newest snapshot.

    step: does one step and returns scalars to log, 0-d tensors or numbers, possibly none. Every `log_every`
        steps the means over the steps that returned each are logged, at the number of steps done.
    state: everything that steps change, by name. Modules and optimisers fit as they are.
    hooks: see `Hook`.
    snapshots: where the run is kept every `snapshot_every` steps. The caller removes them once its outputs
        are published. SIGTERM and Ctrl-C keep a snapshot, then end the process with status 143 or 130.

    Raises `UserError` at the first scalar that is not finite, with earlier snapshots left as they are.
    """
    averages = Averages(name)
    found = snapshots.latest()
    start, kept = found if found is not None else (0, None)
    if kept is not None:
        for key, part in state.items():
            part.load_state_dict(kept["state"][key])
        averages.load_state_dict(kept["averages"])
        print(f"{name}: going on from step {start} of {steps}", flush=True)
    log = MetricLog(log_folder, kept["log"] if kept is not None else None)
    on_cpu = torch.device(device).type == "cpu"

    def keep(done: int) -> None:
        parts = {key: part.state_dict() for key, part in state.items()}
        snapshots.save(done, {"state": parts, "averages": averages.state_dict(), "log": log.content()})

    def run_hooks(done: int) -> None:
        for hook in hooks:
            if done % hook.every == 0 or done == steps:
                seed_step(seed, done, rank, hook=True)
                log.log(done, {key: float(value) for key, value in (hook.run(done) or {}).items()})

    progress = tqdm(total=steps, initial=start, desc=name, unit="step", disable=None, dynamic_ncols=True)
    with Interrupts(name) as interrupts, progress:
        for done in range(start + 1, steps + 1):
            seed_step(seed, done - 1, rank)
            averages.add(done, step(done - 1))
            if on_cpu:
                averages.flush()
            if done % log_every == 0 or done == steps:
                means = averages.take()
                log.log(done, means)
                progress.set_postfix({key: f"{value:.4g}" for key, value in means.items()}, refresh=False)
            if done < steps:
                run_hooks(done)
            if done % snapshot_every == 0 or interrupts.received is not None:
                keep(done)
            progress.update()
            if interrupts.received is not None:
                snapshots.wait()
                interrupts.leave()
        log.log(steps, {})
        run_hooks(steps)
        log.write()
    snapshots.wait()
