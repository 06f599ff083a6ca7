"""Pickles from elsewhere: plain values, stand-ins, and what is refused."""

from __future__ import annotations

import collections
import io
import pickle
import struct
from typing import Any

import pytest

from prelar.utils import pickles


class Pair:
    """Stands in for a class: holds what it was given."""

    def __init__(self, *given: Any) -> None:
        self.given = given


KNOWN = {"collections OrderedDict": dict, "x Pair": Pair}
PLAIN = {"a": [1, 2.5, None, True, "word", b"bytes"], "b": {"c": (1, (2,), ())}, 7: 2**70, "d": {}}


def load(content: bytes) -> Any:
    return pickles.load(io.BytesIO(content), KNOWN, kind="file")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_are_read_as_pickle_reads_them(protocol: int) -> None:
    assert load(pickle.dumps(PLAIN, protocol)) == PLAIN


def test_a_stream_of_pickles_is_read_one_by_one() -> None:
    stream = io.BytesIO(pickle.dumps([1]) + pickle.dumps("two") + b"rest")
    assert [pickles.load(stream, {}, kind="file") for _ in range(2)] == [[1], "two"]
    assert stream.read() == b"rest"


def test_names_are_their_stand_ins() -> None:
    assert load(pickle.dumps(collections.OrderedDict(a=1), 2)) == {"a": 1}
    assert load(b"\x80\x04cx\nPair\nK\x01K\x02\x86R.").given == (1, 2)
    with pytest.raises(ValueError, match=r"names collections\.Counter, which no file needs: refused"):
        load(pickle.dumps(collections.Counter("a")))


def test_only_who_expects_persistent_ids_gets_them() -> None:
    content = b"\x80\x02K\x05Q."
    assert pickles.load(io.BytesIO(content), {}, kind="file", persistent=lambda told: told + 1) == 6
    with pytest.raises(ValueError, match="holds BINPERSID, which no file needs"):
        load(content)


def test_keys_are_short_texts_and_whole_numbers() -> None:
    assert load(pickle.dumps({(1, 2): "a", 2**64: "b", None: "c", "d": 1, 3: 2})) == {"d": 1, 3: 2}
    with pytest.raises(ValueError, match="a key of 100000 characters"):
        load(pickle.dumps({"x" * 100_000: 1}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x04cx\nPair\n(" + b"N" * 17 + b"tR.", "a call without arguments, or with too many"),
        (b"\x80\x04cx\nPair\nNR.", "a call without arguments, or with too many"),
        (b"\x80\x04N)R.", "damaged: not a pickle of a file"),
        (b"\x80\x04NNb.", "damaged: not a pickle of a file"),
        (b"\x80\x04(.", "damaged: not a pickle of a file"),
        (b"\x80\x04B" + struct.pack("<I", 1 << 31) + b"x.", "expected 2147483648 bytes"),
        (b"", "pickle exhausted before seeing STOP"),
    ],
)
def test_what_is_damaged_has_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load(content)


def test_the_number_of_steps_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_STEPS", 100)
    with pytest.raises(ValueError, match="takes more than 100 steps"):
        load(b"\x80\x04" + b"}" * 200 + b".")
