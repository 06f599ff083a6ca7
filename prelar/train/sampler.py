"""Batches of random segments of clips, as a pure function of the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prelar.store.store import Store
from prelar.utils.errors import UserError
from prelar.utils.seeds import RngStream, generator

Batch = dict[str, Tensor]
Numbers = npt.NDArray[np.int64]

_KEPT = 2
_AHEAD = 6
"""Steps ahead of which a cache of a remote store begins to fetch."""


class SegmentSampler:
    """Segments of `length` frames, every clip that is long enough once an epoch.

    A segment's frames are neighbours, or `gap` seconds apart by the rate of its clip.

    The order is a pure function of (seed, step): the clips of an epoch are permuted by (seed, epoch), and
    where a segment starts in its clip is drawn, uniformly, by (seed, epoch, position). So a run resumes at
    any step without state, and `world` processes of rank 0, 1, … take disjoint rows of the same global batch
    of `batch` segments; one process takes them all. An epoch's last batch runs on into the next epoch.

    Of a mixture, `Shares` says which source each row is of, and every source has epochs of its own.
    """

    def __init__(
        self,
        store: Store,
        *,
        length: int,
        batch: int,
        seed: int,
        split: str | None = "train",
        label: str | None = None,
        rank: int = 0,
        world: int = 1,
        gap: float | None = None,
    ) -> None:
        """Raises `UserError` where no clip is long enough, in a mixture of any source, or one tells no rate
        that `gap` needs, and where the batch does not divide by `world`."""
        if batch % world:
            raise UserError(f"batch = {batch}: not divisible among {world} processes; make it a multiple")
        self._store = store
        self._strides = store.strides(gap)
        clips, parts = store.clips(split=split, label=label, min_length=length, gap=gap), store.parts
        self._clips = store.split_parts(clips)
        for number, found in enumerate(self._clips):
            if len(found) == 0:
                lacking = store.members[number].store if len(parts) > 1 else store
                raise UserError(_too_short(lacking, split, label, length, gap))
        self._shares = Shares([weight for _, weight in parts], batch, seed)
        self._length = length
        self._batch = batch
        self._seed = seed
        self._rows = range(rank * batch // world, (rank + 1) * batch // world)
        self._announced = -1
        self._epochs: list[dict[int, tuple[Numbers, Numbers]]] = [{} for _ in parts]

    @property
    def num_clips(self) -> int:
        """Clips that are long enough: the segments of one epoch, of a mixture of one of each source."""
        return sum(map(len, self._clips))

    def segments(self, step: int) -> tuple[Numbers, Numbers]:
        """Clip numbers and first frames within them of this process's rows at `step`, int64 (B,) each."""
        clips, starts = [], []
        for row in self._rows:
            part, number = self._shares.row(step * self._batch + row)
            epoch, position = divmod(number, len(self._clips[part]))
            order, begins = self._epoch(part, epoch)
            clips.append(order[position])
            starts.append(begins[position])
        return np.array(clips, dtype=np.int64), np.array(starts, dtype=np.int64)

    def at(self, step: int) -> Batch:
        """The batch of `step`, of B = batch / world segments of T = length frames, on the CPU.

        image uint8 (B, T, 64, 64, 3); is_first bool (B, T), true at every segment's first frame; clip and
        start int64 (B,), the clip's number and the first frame within it.
        """
        clips, starts = self.segments(step)
        begins, strides = self._store.clip_start[clips] + starts, self._strides[clips]
        self._announce(step)
        first = np.zeros((len(clips), self._length), dtype=np.bool_)
        first[:, 0] = True
        return {
            "image": torch.from_numpy(self._store.read_many(begins, self._length, strides=strides)),
            "is_first": torch.from_numpy(first),
            "clip": torch.from_numpy(clips),
            "start": torch.from_numpy(starts),
        }

    def _announce(self, step: int) -> None:
        """Let a remote store begin to fetch what the next steps read."""
        if not step - 1 <= self._announced - _AHEAD <= step:
            self._announced = step
        while self._store.is_cached and self._announced < step + _AHEAD:
            self._announced += 1
            clips, starts = self.segments(self._announced)
            begins, strides = self._store.clip_start[clips] + starts, self._strides[clips]
            self._store.prefetch(begins, self._length, strides=strides)

    def _epoch(self, part: int, epoch: int) -> tuple[Numbers, Numbers]:
        """The clips of an epoch of a source in order, and where the segment of each starts."""
        epochs = self._epochs[part]
        if epoch not in epochs:
            while len(epochs) >= _KEPT:
                del epochs[min(epochs)]
            random = generator(RngStream.CLIPS, self._seed, epoch, *([part] if part else []))
            order = random.permutation(self._clips[part])
            choices = self._store.clip_length[order] - (self._length - 1) * self._strides[order]
            epochs[epoch] = order, random.integers(choices)
        return epochs[epoch]


class Shares:
    """Which of several sources each row of a run is of: a pure function of weights, batch, seed and row.

    Rows come in blocks of whole batches, so many that the least weight has a row or more in the mean of them.
    Of all rows up to the end of any block, each source has its share by weight, rounded down or up; within a
    block they lie in an order drawn by (seed, block).
    """

    def __init__(self, weights: Sequence[float], batch: int, seed: int) -> None:
        total = sum(map(Fraction, weights))
        shares = [Fraction(weight) / total for weight in weights]
        self._ends = [Fraction(0), *itertools.accumulate(shares)]
        self._block = batch * math.ceil(1 / (batch * min(shares)))
        self._seed = seed
        self._blocks: dict[int, tuple[Numbers, Numbers]] = {}

    def row(self, row: int) -> tuple[int, int]:
        """The source of a row, and how many rows before it are of that source."""
        if len(self._ends) == 2:
            return 0, row
        block, inside = divmod(row, self._block)
        if block not in self._blocks:
            while len(self._blocks) >= _KEPT:
                del self._blocks[min(self._blocks)]
            self._blocks[block] = self._drawn(block)
        sources, numbers = self._blocks[block]
        return int(sources[inside]), int(numbers[inside])

    def before(self, block: int) -> list[int]:
        """The rows of each source in the blocks before a block."""
        ends = [math.floor(block * self._block * end) for end in self._ends]
        return [end - begin for begin, end in itertools.pairwise(ends)]

    def _drawn(self, block: int) -> tuple[Numbers, Numbers]:
        """Of the rows of a block in order: the source, and how many rows of it come before."""
        before, after = self.before(block), self.before(block + 1)
        counts = np.array(after) - np.array(before)
        random = generator(RngStream.MIXTURE, self._seed, block)
        sources = random.permutation(np.repeat(np.arange(len(counts)), counts))
        numbers = np.empty_like(sources)
        for source, first in enumerate(before):
            numbers[sources == source] = first + np.arange(counts[source])
        return sources, numbers


def _too_short(store: Store, split: str | None, label: str | None, length: int, gap: float | None) -> str:
    """Why no clip of a split and a label gives a segment, and what to do."""
    clips = store.clips(split=split, label=label)
    of_split = store.clip_length[clips]
    named = {"split": split, "label": label}
    where = ", ".join([str(store.path), *(f"{key} {name}" for key, name in named.items() if name)]) + ": "
    if len(of_split) == 0:
        return f"{where}holds no clip; build the store from an archive that has some"
    if gap is None or of_split.max() < length:
        return (
            f"{where}no clip has {length} frames, the longest has {of_split.max()}; "
            "lower length to that or less"
        )
    widest = (of_split - 1) // (length - 1) / store.clip_index["fps"].to_numpy()[clips]
    lower = f"{np.median(widest[of_split >= length]):g}"
    remain = len(store.clips(split=split, label=label, min_length=length, gap=float(lower)))
    return (
        f"{where}no clip has {length} frames {gap:g} s apart; {remain} of {len(clips)} clips have "
        f"{length} frames at a gap of {lower} s or less; lower frame_gap or length"
    )
