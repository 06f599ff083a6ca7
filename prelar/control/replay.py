"""Past episodes on disk, and the sequences that are drawn from them to learn from.

Steps lie one after another in a single file of fixed-size records, read and written by `pread` and `pwrite`.
In memory there are two numbers per episode. torchrl's memory-mapped storage with its slice sampler was tried
instead: on the same 40,000 steps its resident set grew by 600 MB, ours by 9, drawing 50 × 50 steps took it
four times the processor time, its draws follow a global generator instead of (seed, update), and none of its
samplers favours ends.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prelar.utils.errors import UserError
from prelar.utils.frames import SIZE
from prelar.utils.seeds import RngStream, generator

Records = npt.NDArray[np.void]


class Span(NamedTuple):
    """An episode: number of its first step since the replay began, and its number of steps."""

    start: int
    length: int


def record_type(action_dim: int, size: int = SIZE) -> np.dtype[np.void]:
    """One step: the image, the action that led to it and the reward that came with it (both 0 at a start)."""
    fields = [("image", "u1", (size, size, 3)), ("action", "<f4", (action_dim,)), ("reward", "<f4")]
    return np.dtype(fields)


class Replay:
    """The latest `capacity` steps, in whole episodes.

    path: the file. capacity: steps that sequences are drawn from; older episodes are forgotten whole.
    margin: further steps that the file keeps before their place is used again. A state from `state_dict` can
    be taken up again as long as no more than `margin` steps were added after it.
    """

    def __init__(self, path: Path, *, capacity: int, margin: int, action_dim: int, size: int = SIZE) -> None:
        self.records = record_type(action_dim, size)
        self.capacity = capacity
        self._slots = capacity + margin
        self._spans: deque[Span] = deque()
        self._written = 0
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def __len__(self) -> int:
        """Steps that sequences are drawn from."""
        return sum(span.length for span in self._spans)

    @property
    def episodes(self) -> int:
        """Episodes that sequences are drawn from."""
        return len(self._spans)

    def add(self, episode: Records) -> None:
        """Append a whole episode: (n,) records of `record_type`. Raises `UserError` if the disk is full."""
        if len(episode) > self.capacity:
            raise ValueError(f"an episode of {len(episode)} steps; the replay holds {self.capacity}")
        data = np.ascontiguousarray(episode, dtype=self.records)
        done = 0
        for slot, count in self._pieces(self._written, len(data)):
            self._write(data[done : done + count], slot)
            done += count
        self._spans.append(Span(self._written, len(data)))
        self._written += len(data)
        while len(self) > self.capacity:
            self._spans.popleft()

    def choose(self, *, batch: int, length: int, seed: int, update: int) -> list[int]:
        """Where to read `batch` sequences of `length` steps, each from one episode.

        A pure function of the arguments and of the episodes held. An episode is drawn uniformly, then a start
        that favours its end (DreamerV2's replay): min(u, n - length), u uniform in 0, …, n, of an episode of
        n steps. Raises `UserError` where no episode is long enough.
        """
        spans = [span for span in self._spans if span.length >= length]
        if not spans:
            raise UserError(f"replay: no episode of {length} steps yet; raise prefill or lower length")
        random = generator(RngStream.REPLAY, seed, update)
        starts = []
        for choice in random.integers(len(spans), size=batch):
            start, total = spans[choice]
            starts.append(start + min(int(random.integers(total + 1)), total - length))
        return starts

    def read(self, starts: Sequence[int], length: int) -> dict[str, Tensor]:
        """The sequences that begin at the steps `starts`, which may no longer be held, within the margin.

        Returns image uint8 (B, T, 64, 64, 3), action float32 (B, T, A), reward float32 (B, T) and is_first
        bool (B, T), true for the first step of every sequence. Another thread may call this.
        """
        data = np.empty((len(starts), length), self.records)
        for row, start in zip(data, starts, strict=True):
            self._read(row, start)
        is_first = np.zeros(data.shape, np.bool_)
        is_first[:, 0] = True
        fields = {name: np.ascontiguousarray(data[name]) for name in ("image", "action", "reward")}
        fields["is_first"] = is_first
        return {name: torch.from_numpy(value) for name, value in fields.items()}

    def state_dict(self) -> dict[str, Any]:
        """Which episodes are held, once their steps are safely on the disk."""
        os.fsync(self._file)
        return {"written": self._written, "spans": [list(span) for span in self._spans]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state whose steps are in the file. Raises `UserError` where the file is too short."""
        spans = deque(Span(int(start), int(length)) for start, length in state["spans"])
        needed = min(int(state["written"]), self._slots) * self.records.itemsize
        if os.fstat(self._file).st_size < needed:
            raise UserError(f"{self._path}: too short; delete {self._path.parent} to start anew")
        self._spans, self._written = spans, int(state["written"])

    def close(self) -> None:
        """Close the file; the replay is not used afterwards."""
        os.close(self._file)

    def _pieces(self, start: int, count: int) -> list[tuple[int, int]]:
        """Where `count` steps from number `start` on lie: at most two pairs (first slot, number of slots)."""
        slot = start % self._slots
        first = min(count, self._slots - slot)
        return [(slot, first), (0, count - first)] if first < count else [(slot, count)]

    def _read(self, into: Records, start: int) -> None:
        view = into.view(np.uint8).data
        done = 0
        for slot, count in self._pieces(start, len(into)):
            size = count * self.records.itemsize
            if os.preadv(self._file, [view[done : done + size]], slot * self.records.itemsize) != size:
                raise UserError(f"{self._path}: cannot be read; delete {self._path.parent} to start anew")
            done += size

    def _write(self, data: Records, slot: int) -> None:
        rest = data.view(np.uint8).data
        offset = slot * self.records.itemsize
        try:
            while rest:
                done = os.pwrite(self._file, rest, offset)
                rest, offset = rest[done:], offset + done
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                size = self._slots * self.records.itemsize / 1e9
                raise UserError(f"{self._path}: disk full; the replay needs {size:.1f} GB") from None
            raise
