"""Batches of random segments of clips, as a pure function of the step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prelar.store.store import Store
from prelar.utils.errors import UserError
from prelar.utils.seeds import RngStream, generator

Batch = dict[str, Tensor]

_EPOCHS_KEPT = 2


class SegmentSampler:
    """Segments of `length` frames, every clip that is long enough once an epoch.

    A segment's frames are neighbours, or `gap` seconds apart by the rate of its clip.

    The order is a pure function of (seed, step): the clips of an epoch are permuted by (seed, epoch), and
    where a segment starts in its clip is drawn, uniformly, by (seed, epoch, position). So a run resumes at
    any step without state, and `world` processes of rank 0, 1, … take disjoint rows of the same global batch
    of `batch` segments; one process takes them all. An epoch's last batch runs on into the next epoch.
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
        """Raises `UserError` where no clip is long enough or one tells no rate that `gap` needs, and where
        the batch does not divide by `world`."""
        if batch % world:
            raise UserError(f"batch = {batch}: not divisible among {world} processes; make it a multiple")
        self._store = store
        self._strides = store.strides(gap)
        self._clips = store.clips(split=split, label=label, min_length=length, gap=gap)
        if len(self._clips) == 0:
            raise UserError(_too_short(store, split, label, length, gap))
        self._length = length
        self._batch = batch
        self._seed = seed
        self._rows = range(rank * batch // world, (rank + 1) * batch // world)
        self._actions = store.array("actions") if store.has("actions") else None
        self._epochs: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}

    @property
    def num_clips(self) -> int:
        """Clips that are long enough: the segments of one epoch."""
        return len(self._clips)

    def segments(self, step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Clip numbers and first frames within them of this process's rows at `step`, int64 (B,) each."""
        clips, starts = [], []
        for row in self._rows:
            epoch, position = divmod(step * self._batch + row, len(self._clips))
            order, begins = self._epoch(epoch)
            clips.append(order[position])
            starts.append(begins[position])
        return np.array(clips, dtype=np.int64), np.array(starts, dtype=np.int64)

    def at(self, step: int) -> Batch:
        """The batch of `step`, of B = batch / world segments of T = length frames, on the CPU.

        image uint8 (B, T, 64, 64, 3); is_first bool (B, T), true at every segment's first frame; clip and
        start int64 (B,), the clip's number and the first frame within it; actions float32 (B, T, A) where the
        store has them, row t as stored with frame t: with a gap, the first of the actions that lead on.
        """
        clips, starts = self.segments(step)
        begins, strides = self._store.clip_start[clips] + starts, self._strides[clips]
        first = np.zeros((len(clips), self._length), dtype=np.bool_)
        first[:, 0] = True
        batch = {
            "image": torch.from_numpy(self._store.read_many(begins, self._length, strides=strides)),
            "is_first": torch.from_numpy(first),
            "clip": torch.from_numpy(clips),
            "start": torch.from_numpy(starts),
        }
        if self._actions is not None:
            rows = begins[:, None] + strides[:, None] * np.arange(self._length)
            batch["actions"] = torch.from_numpy(self._actions[rows])
        return batch

    def _epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The clips of an epoch in order, and where the segment of each starts."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[min(self._epochs)]
            random = generator(RngStream.CLIPS, self._seed, epoch)
            order = random.permutation(self._clips)
            choices = self._store.clip_length[order] - (self._length - 1) * self._strides[order]
            self._epochs[epoch] = order, random.integers(choices)
        return self._epochs[epoch]


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
