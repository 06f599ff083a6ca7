"""The one training loop: steps, logs, progress, snapshots and signals. It takes functions for all the rest.

What happens in a step is a function of (seed, step) and of the state that snapshots hold: torch's global
generator is seeded anew before every step, so no generator's state needs keeping. A run that was killed and
resumed therefore ends with the same weights and the same log, byte for byte on a CPU, as one that was not.
Several processes may take the steps together, each on its share of the batch.
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
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from prelar.train.checkpoint import Snapshots
from prelar.train.loggers import Logger, open_loggers
from prelar.utils.distributed import Processes, is_lost_process, launch
from prelar.utils.errors import UserError, printable
from prelar.utils.files import remove, write_text
from prelar.utils.seeds import RngStream, seed_torch

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


class Machine(Protocol):
    """What params.yaml says of the machine, as `set_up` takes it."""

    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def deterministic(self) -> bool: ...


@dataclass(frozen=True)
class Hook:
    """Work between steps: `run(step)` after every multiple of `every` steps, and once at the end of the run.

    It may return scalars, which are logged at that step as they are. It must not change what training sees.
    Only what it returns is kept when a run is resumed, not the files it writes: let the last call write them.
    `video` is an MP4 that it writes, by the name that loggers give it.
    """

    every: int
    run: Callable[[int], Scalars | None]
    video: tuple[str, Path] | None = None


def set_up(
    *, device: str, precision: str, threads: int, deterministic: bool = False, devices: int | None = None
) -> Fabric:
    """Settle device, precision, CPU threads and determinism for this process, and return its Fabric.

    `device` is auto, cpu or cuda; `precision` is fp32 or bf16 (mixed); `devices` counts the processes that
    take the steps together, None being a stage of one. On a CPU, and where `deterministic` asks for it, only
    deterministic algorithms are allowed. Raises `UserError` where the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = cuda: no CUDA device answers; set device to cpu or auto")
    accelerator = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    deterministic = deterministic or accelerator == "cpu"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    fabric = launch(accelerator=accelerator, precision=PRECISIONS[precision], devices=devices)
    torch.set_num_threads(threads)
    return fabric


def fabric_of(machine: Machine, devices: int | None = None) -> Fabric:
    """`set_up` as params.yaml says."""
    return set_up(
        device=machine.device,
        precision=machine.precision,
        threads=machine.threads,
        deterministic=machine.deterministic,
        devices=devices,
    )


def compiles(choice: str, fabric: Fabric) -> bool:
    """Whether training steps are compiled: `choice` is auto (on a GPU), always, graphs or never.

    A trifle is compiled first. Where that fails, as without a compiler, `auto` says so and steps are plain,
    and `always` and `graphs` raise `UserError`.
    """
    if choice == "never" or (choice == "auto" and fabric.device.type != "cuda"):
        return False
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(2, device=fabric.device))
    except Exception as error:  # of many kinds, by what is missing
        reason = printable(str(error).partition("\n")[0] or type(error).__name__, 200)
        message = f"compile = {choice}: torch.compile fails here ({reason}); install g++ and Python's headers"
        if choice != "auto":
            raise UserError(f"{message}, or set compile to never") from None
        if fabric.is_global_zero:
            print(f"{message}; steps are not compiled", file=sys.stderr)
        return False
    return True


def adam(groups: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float) -> Adam:
    """Adam as the methods use it, over parameters or parameter groups."""
    return Adam(groups, lr=lr, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY, fused=True)


def descend(fabric: Fabric, optimizer: Optimizer, loss: Tensor) -> Tensor:
    """One step down the gradient of `loss`, of which each parameter group is clipped by itself.

    A group stands for one of the published code's optimisers. Returns the norm of the whole gradient before
    clipping, 0-d.
    """
    optimizer.zero_grad(set_to_none=True)
    fabric.backward(loss)
    norms = [nn.utils.clip_grad_norm_(group["params"], CLIP_NORM) for group in optimizer.param_groups]
    optimizer.step()
    return torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64)


def seed_step(seed: int, step: int, *, hook: bool = False) -> None:
    """Seed torch's global generator as a function of the arguments: for a step, or for the hooks after it.

    Processes that share a batch seed theirs alike; see `prelar.utils.distributed`.
    """
    seed_torch(RngStream.HOOK if hook else RngStream.STEP, seed, step)


class MetricLog:
    """Scalars by step, in files that DVC plots: `metrics.json` and `plots/metrics/<name>.tsv`, without times.

    What the folder held before is removed; `content` puts back the log of the run that is resumed. The log is
    kept in memory as well and never read from the disk again, so that it stays whole where somebody removes
    the folder while the run goes on.
    """

    def __init__(self, folder: Path, content: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._texts = dict(content or {})
        self._summary: dict[str, Any] = json.loads(self._texts.get(SUMMARY, "{}"))
        remove(folder)
        folder.mkdir(parents=True)
        self.write()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row for each value, to six significant digits."""
        if not (self.folder / SUMMARY).exists():
            self.write()
        for name, value in values.items():
            *groups, last = name.split("/")
            group = self._summary
            for outer in groups:
                group = group.setdefault(outer, {})
            group[last] = float(f"{value:.6g}")
            path = f"plots/metrics/{name}.tsv"
            row = f"{step}\t{group[last]}\n"
            if path not in self._texts:
                row = f"step\t{last}\n{row}"
            self._texts[path] = self._texts.get(path, "") + row
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (self.folder / path).open("a", encoding="utf-8") as file:
                file.write(row)
        self._summary["step"] = step
        self._texts[SUMMARY] = json.dumps(self._summary, indent=4) + "\n"
        write_text(self.folder / SUMMARY, self._texts[SUMMARY])

    def content(self) -> dict[str, str]:
        """The text of every file of the log, by its path in the folder."""
        return dict(self._texts)

    def write(self) -> None:
        """Write every file anew, whatever became of it on the disk."""
        for name, text in self._texts.items():
            write_text(self.folder / name, text)


def summary(folder: Path) -> str:
    """The newest value of everything in a run's log, for a screen: a line each, indented."""
    rows: list[tuple[str, float]] = []

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}/{key}" if name else key, inner)
        elif name != "step":
            rows.append((name, float(value)))

    collect("", json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
    width = max((len(name) for name, _ in rows), default=0)
    return "".join(f"  {name:<{width}}  {value:.4g}\n" for name, value in rows)


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


class GracefulShutdown:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C only leave a note, so that the step under way can end.

    A second signal ends the process at once, as it would have without this; Ctrl-C says so where `tells`.
    `name` is the run's.
    """

    def __init__(self, name: str, *, tells: bool = True) -> None:
        self.name, self.tells = name, tells
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
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
        if number == signal.SIGINT and self.tells:
            message = f"\n{self.name}: finishing the step under way to keep it; Ctrl-C again stops at once\n"
            os.write(STDERR, message.encode())  # print is not safe within a signal handler

    @staticmethod
    def exit(number: int) -> None:
        """End the run as signal `number` asks: status 130 after Ctrl-C, else 128 and the number."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)


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
    loggers: Sequence[str] = (),
    fabric: Fabric | None = None,
) -> None:
    """Run `step(0)`, …, `step(steps - 1)`, or go on from the newest snapshot.

    step: does one step and returns scalars to log, 0-d tensors or numbers, possibly none. Every `log_every`
        steps the means over the steps that returned each are logged, at the number of steps done.
    state: everything that steps change, by name. Modules and optimisers fit as they are.
    hooks: see `Hook`.
    loggers: names of `prelar.train.loggers.KINDS`, which take what is logged too.
    snapshots: where the run is kept every `snapshot_every` steps. The caller removes them once its outputs
        are published. SIGTERM, SIGUSR1 and Ctrl-C keep a snapshot, then end the process with status 143, 138
        or 130.
    fabric: of `set_up`. Of several processes every one calls this, with scalars that are the same in all; the
        first alone logs, runs hooks and keeps snapshots. A signal to any of them stops all after the same
        step; the first then ends with the status, the others with 0.

    Raises `UserError` at the first scalar that is not finite, and where another process is lost, with earlier
    snapshots left as they are.
    """
    run = _Run(name, steps, seed, state, snapshots, log_folder, hooks, loggers, Processes(fabric))
    on_cpu = fabric is None or fabric.device.type == "cpu"
    try:
        start = run.resume()
        with GracefulShutdown(name, tells=run.processes.first) as interrupts, run.progress(start):
            for done in range(start + 1, steps + 1):
                seed_step(seed, done - 1)
                run.averages.add(done, step(done - 1))
                if on_cpu:
                    run.check()
                if done % log_every == 0 or done == steps:
                    run.report(done)
                if done < steps:
                    run.run_hooks(done)
                stop = run.processes.largest(interrupts.received or 0)
                if done % snapshot_every == 0 or stop:
                    run.save_snapshot(done)
                run.bar.update()
                if stop:
                    run.exit(stop)
            run.run_hooks(steps)
        run.finish()
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise UserError(
            f"{name}: another process of this run is gone; start it again to go on from its last snapshot"
        ) from error
    finally:
        run.close()
        snapshots.settle()


class _Run:
    """What `train` keeps beside the steps: log, progress, snapshots, what of these the first does alone."""

    log: MetricLog
    bar: Any

    def __init__(
        self,
        name: str,
        steps: int,
        seed: int,
        state: Mapping[str, Stateful],
        snapshots: Snapshots,
        log_folder: Path,
        hooks: Sequence[Hook],
        loggers: Sequence[str],
        processes: Processes,
    ) -> None:
        self.name, self.steps, self.seed = name, steps, seed
        self.state, self.snapshots, self.hooks = state, snapshots, hooks
        self.log_folder, self.processes = log_folder, processes
        self.averages = Averages(name)
        self.wanted, self.loggers = loggers, list[Logger]()

    def resume(self) -> int:
        """Put back the newest snapshot, in all processes; returns the steps done, and opens the log."""
        found = self.snapshots.latest() if self.processes.first else None
        start = self.processes.largest(found[0] if found is not None else 0)
        kept = found[1] if found is not None else self.snapshots.read(start) if start else None
        if kept is not None:
            for key, part in self.state.items():
                part.load_state_dict(kept["state"][key])
            self.averages.load_state_dict(kept["averages"])
        if self.processes.first:
            if kept is not None:
                print(f"{self.name}: going on from step {start} of {self.steps}", flush=True)
            self.log = MetricLog(self.log_folder, kept["log"] if kept is not None else None)
            self.loggers = open_loggers(self.wanted, self.name, self.snapshots.folder.name, start)
        return start

    def progress(self, start: int) -> Any:
        """The progress bar, shown on a terminal by the first process."""
        self.bar = tqdm(
            total=self.steps,
            initial=start,
            desc=self.name,
            unit="step",
            disable=None if self.processes.first else True,
            dynamic_ncols=True,
        )
        return self.bar

    def check(self) -> None:
        """Look at the scalars so far. What is wrong with them is printed by the first process."""
        try:
            self.averages.flush()
        except UserError:
            if self.processes.first:
                raise
            sys.exit(0)

    def report(self, done: int) -> None:
        """Log the means since the last report."""
        self.check()
        means = self.averages.take()
        if self.processes.first:
            self._log(done, means)
            self.bar.set_postfix({key: f"{value:.4g}" for key, value in means.items()}, refresh=False)

    def run_hooks(self, done: int) -> None:
        """Run the hooks that are due."""
        if not self.processes.first:
            return
        if done == self.steps:
            self._log(done, {})
        for hook in self.hooks:
            if done % hook.every == 0 or done == self.steps:
                seed_step(self.seed, done, hook=True)
                self._log(done, {key: float(value) for key, value in (hook.run(done) or {}).items()})
                if hook.video is not None:
                    for logger in self.loggers:
                        logger.video(done, *hook.video)

    def _log(self, done: int, values: Mapping[str, float]) -> None:
        """Log scalars, in the log and wherever else they are wanted."""
        self.log.log(done, values)
        for logger in self.loggers:
            logger.log(done, values)

    def save_snapshot(self, done: int) -> None:
        """Keep a snapshot, in the background."""
        self.check()
        if self.processes.first:
            parts = {key: part.state_dict() for key, part in self.state.items()}
            content = {"state": parts, "averages": self.averages.state_dict(), "log": self.log.content()}
            self.snapshots.save(done, content)

    def exit(self, number: int) -> None:
        """End all processes as signal `number` asks, once the snapshot is written."""
        self.snapshots.wait()
        self.processes.largest(0)
        if not self.processes.first:
            sys.exit(0)
        GracefulShutdown.exit(number)

    def finish(self) -> None:
        """Write what is left to write."""
        if self.processes.first:
            self.log.write()
        self.snapshots.wait()

    def close(self) -> None:
        """Close the loggers, however the run ended."""
        for logger in self.loggers:
            logger.close()
