"""Files of torch.save: read as torch reads them, without its unpickler; crafted ones cost nothing."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prelar import torch_file
from prelar.import_reference import read_weights
from prelar.utils.errors import UserError
from tests.memory import growth

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
MORE = (torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)


def a_training_run() -> dict[str, Any]:
    """What a training script would save: modules, an optimiser, numbers, views of one storage."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimiser.step()
    shared = torch.arange(24.0).reshape(4, 6)
    return {
        "model": module.state_dict(),
        "optimiser": optimiser.state_dict(),
        "parameter": nn.Parameter(torch.randn(2)),
        "views": {
            "whole": shared,
            "turned": shared.T,
            "part": shared[1:, 2:4],
            "wide": shared[:1].expand(3, 6),
        },
        "odd": {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 2), "step": torch.tensor(3)},
        "types": {str(dtype): torch.tensor([0, 1, 2]).to(dtype) for dtype in DTYPES + MORE},
        "about": [1, 2.0, None, "x", b"x", {1, 2}, (True, 1j), Counter("a"), torch.Size([2]), torch.float32],
        "sparse": torch.eye(2).to_sparse(),
        "place": torch.device("cpu"),
    }


def same(told: Any, wanted: Any, storages: Mapping[str, Tensor]) -> int:
    """How many tensors of what torch has read are in what was read here, equal and under the same names."""
    if isinstance(wanted, Mapping):
        assert told.keys() == wanted.keys()
        return sum(same(told[key], value, storages) for key, value in wanted.items())
    if isinstance(wanted, Tensor) and wanted.layout == torch.strided:
        value = told.tensor(storages)
        assert value.dtype == wanted.dtype and value.shape == wanted.shape and torch.equal(value, wanted)
        assert told.nbytes == wanted.numel() * wanted.element_size()
        return 1
    return 0


@pytest.mark.parametrize("old", [False, True])
def test_tensors_are_those_that_torch_reads(tmp_path: Path, old: bool) -> None:
    file = tmp_path / "a.pt"
    torch.save(a_training_run(), file, _use_new_zipfile_serialization=not old)
    wanted = torch.load(file, weights_only=True)
    content, storages = torch_file.read(file)
    assert same(content, wanted, storages) == 39
    assert read_weights(file).keys() == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
    }


# --- Crafted files ------------------------------------------------------------------------------------------

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def tensor(offset: bytes, size: bytes, stride: bytes) -> bytes:
    """Steps that lay a tensor of the storage "0" on the stack: each number in steps of its own."""
    return TENSOR + b"(" + FLOATS + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def named(steps: bytes) -> bytes:
    """A pickle of a dict that holds, as "w", what the steps lay on the stack."""
    return b"\x80\x02}X\x01\x00\x00\x00w" + steps + b"s."


HUGE = b"\x8a\x07" + b"\xff" * 6 + b"\x00"  # 2^48 - 1
MIB = b"X\x00\x00\x10\x00" + b"x" * (1 << 20)
DOUBLED = b"N" + b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(60))
CRAFTED = {
    "a bytearray of a terabyte": named(b"c__builtin__\nbytearray\n\x8a\x06" + b"\x00" * 5 + b"\x01\x85R"),
    "a tensor without numbers": named(b"ctorch\nTensor\n\x8a\x06" + b"\x00" * 5 + b"\x01\x85R"),
    "a storage of a terabyte": named(b"ctorch\nFloatStorage\n\x8a\x06" + b"\x00" * 5 + b"\x01\x85R"),
    "a key of tuples, doubled sixty times": b"\x80\x02}" + DOUBLED + b"Ns.",
    "a set of tuples, doubled sixty times": named(b"c__builtin__\nset\n](" + DOUBLED + b"e\x85R"),
    "bytes of a long text, over and over": named(
        b"c_codecs\nencode\nq\x00" + MIB + b"q\x01" + b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R" * 300
    ),
    "a key that is long to compare": b"\x80\x02}" + MIB + b"Ns.",
    "a memo of 2^31": b"\x80\x02Nr\x00\x00\x00\x80.",
    "a call with many arguments": named(TENSOR + b"(" + b"N" * 100_000 + b"tR"),
    "a name from outside": named(b"cos\nmkdir\nX\x05\x00\x00\x00owned\x85R"),
    "an id that names no storage": named(b"K\x05Q"),
    "a tensor of negative size": named(tensor(b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85")),
    "a tensor beyond its storage": named(tensor(b"K\x02", b"K\x04\x85", b"K\x01\x85")),
    "a tensor far beyond its storage": named(tensor(HUGE, b"K\x01\x85", b"K\x01\x85")),
    "a tensor of 2^96 numbers": named(tensor(b"K\x00", HUGE * 2 + b"\x86", b"K\x00K\x00\x86")),
    "a stride of 2^48": named(tensor(b"K\x00", b"K\x02\x85", HUGE + b"\x85")),
    "a size of many axes": named(tensor(b"K\x00", b"(" + b"K\x01" * 99 + b"t", b"(" + b"K\x01" * 99 + b"t")),
}


def write_zip(file: Path, content: bytes, **records: bytes) -> None:
    with zipfile.ZipFile(file, "w") as made:
        for name, held in {"data.pkl": content, "data/0": bytes(16), "version": b"3", **records}.items():
            made.writestr(f"a/{name}", held)


def write_old(file: Path, content: bytes, count: int = 4) -> None:
    head = [torch_file.MAGIC, torch_file.VERSION, {"little_endian": True}]
    rest = pickle.dumps(["0"], 2) + struct.pack("<q", count) + bytes(16)
    content = content.replace(b"K\x04tQ", b"K\x04NtQ")
    file.write_bytes(b"".join(pickle.dumps(one, 2) for one in head) + content + rest)


def refusal(file: Path) -> str:
    """Why a file is refused, in one line and in little memory."""
    with growth() as grown:
        with pytest.raises(UserError) as failure:
            read_weights(file)
        assert grown() < 30
    assert "\n" not in str(failure.value) and str(failure.value).startswith(f"{file}: ")
    return str(failure.value)


@pytest.mark.parametrize("content", CRAFTED.values(), ids=CRAFTED.keys())
def test_crafted_files_are_refused_in_little_memory(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (write_zip, write_old):
        write(Path("a.pt"), content)
        refusal(Path("a.pt"))
    Path("a.pt").write_bytes(content)
    refusal(Path("a.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


GOOD = named(tensor(b"K\x01", b"K\x02\x85", b"K\x01\x85"))


def test_the_writers_of_crafted_files_write_good_ones(tmp_path: Path) -> None:
    for write in (write_zip, write_old):
        write(tmp_path / "a.pt", GOOD)
        assert torch.equal(read_weights(tmp_path / "a.pt")["w"], torch.zeros(2))
        assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["w"], torch.zeros(2))


@pytest.mark.parametrize("count", [-1, 3, 1 << 40, 1 << 62])
def test_counts_before_the_numbers_are_not_believed(tmp_path: Path, count: int) -> None:
    write_old(tmp_path / "a.pt", named(tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85")), count)
    assert "not a file of tensors alone, or damaged" in refusal(tmp_path / "a.pt")


def test_numbers_of_the_other_order_are_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.pt", GOOD, byteorder=b"big")
    assert "not little-endian" in refusal(tmp_path / "a.pt")


def test_a_storage_is_of_one_type(tmp_path: Path) -> None:
    """A second type for the same numbers would make others of them."""
    double = GOOD[5:-2].replace(b"FloatStorage", b"DoubleStorage")
    write_zip(
        tmp_path / "a.pt",
        b"\x80\x02}(X\x01\x00\x00\x00w" + GOOD[9:-2] + b"X\x01\x00\x00\x00v" + double[4:] + b"u.",
    )
    assert "a storage that is refused" in refusal(tmp_path / "a.pt")


def test_many_names_for_the_same_numbers_are_refused(tmp_path: Path) -> None:
    """A thousand names of a million numbers would be read a thousand times."""
    held = torch.zeros(1 << 20)
    torch.save({f"w{number}": held for number in range(1_000)}, tmp_path / "a.pt")
    assert "claims more numbers than the file holds" in refusal(tmp_path / "a.pt")
    torch.save({"a": held, "tied": held}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt").keys() == {"a", "tied"}


def test_state_dicts_with_attributes_are_read(tmp_path: Path) -> None:
    state = OrderedDict(w=torch.ones(2))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "a.pt")
    assert torch.equal(read_weights(tmp_path / "a.pt")["w"], torch.ones(2))
