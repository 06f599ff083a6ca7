"""Files of `torch.save` from elsewhere, read without torch's unpickler: dense tensors among plain values.

    a zip       <name>/data.pkl, a pickle in which tensors name their storages; <name>/data/<key>, their bytes
    before 1.6  pickles one behind the other: a magic number, a version, the system, the content, the keys of
                the storages; then for each key the count of its numbers, int64, and their bytes

All numbers are little-endian. Tensors of other kinds (sparse, quantised, without numbers) are passed over.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from prelar.utils import files, pickles, zips
from prelar.utils.pickles import Name

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
MAX_AXES, MAX_SIZE = 8, 1 << 48
DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch ComplexDoubleStorage": torch.complex128,
    "torch ComplexFloatStorage": torch.complex64,
    "torch.storage UntypedStorage": torch.uint8,
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """The numbers that one or several tensors of a file are made of."""

    key: str
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class TensorView:
    """A tensor as a file tells of it: a view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes its numbers would have."""
        return math.prod(self.size) * self.storage.dtype.itemsize

    def tensor(self, storages: Mapping[str, Tensor]) -> Tensor:
        """The tensor, of the file's storages. Raises `KeyError` or `RuntimeError` where it is not in them."""
        held, width = storages[self.storage.key], self.storage.dtype.itemsize
        whole = held[: len(held) // width * width].view(self.storage.dtype)
        return whole.as_strided(self.size, self.stride, self.offset)


class _Dict(dict[Any, Any]):
    """Stands in for an `OrderedDict`, which as a state dict has attributes."""

    def __init__(self) -> None:
        super().__init__()

    def build(self, state: Any) -> None:
        """Pass the attributes over."""


class _Nothing:
    """Stands in for what no weights are made of."""

    def __init__(self, *_: object) -> None:
        pass

    def build(self, state: Any) -> None:
        """Pass the state over."""


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> TensorView | _Nothing:
    """Stands in for what makes a dense tensor."""
    if not isinstance(storage, Storage):
        return _Nothing()
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) > MAX_AXES:
        raise ValueError("a tensor without a size, or with too many axes")
    if len(size) != len(stride) or not all(_is_size(number) for number in (offset, *size, *stride)):
        raise ValueError("a tensor of an impossible size")
    return TensorView(storage, offset, size, stride)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < MAX_SIZE


def _parameter(data: Any, *_: object) -> Any:
    """Stands in for what makes a parameter of a tensor."""
    return data


def _size(numbers: Any = ()) -> Any:
    """Stands in for a tensor's size."""
    return numbers


_KNOWN: pickles.Known = {
    **dict.fromkeys(DTYPES, _Nothing),
    **{f"torch {str(dtype).removeprefix('torch.')}": _Nothing for dtype in DTYPES.values()},
    "torch Size": _size,
    "torch device": _Nothing,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    **{
        f"torch._utils _rebuild_{kind}": _Nothing
        for kind in ("tensor_v3", "sparse_tensor", "qtensor", "meta_tensor_no_storage", "nested_tensor")
    },
    "torch.serialization _get_layout": _Nothing,
    "collections OrderedDict": _Dict,
    **dict.fromkeys(("collections Counter", "_codecs encode"), _Nothing),
    **{f"{module} {kind}": _Nothing for module in ("builtins", "__builtin__") for kind in ("set", "complex")},
}


class _Storages(dict[str, Storage]):
    """The storages that a pickle names, by key."""

    def name(self, identifier: Any) -> Storage:
        """The storage of a persistent id: a word, its type, its key, where it was and its count."""
        match identifier:
            case ("storage", Name(name=kind), str(key), _, _) | (
                "storage",
                Name(name=kind),
                str(key),
                _,
                _,
                None,
            ):
                storage = Storage(key, DTYPES[kind])
                if len(key) <= pickles.MAX_KEY and self.setdefault(key, storage) == storage:
                    return storage
        raise ValueError("a storage that is refused")


def read(file: Path) -> tuple[Any, dict[str, Tensor]]:
    """What a file holds: plain values, a `TensorView` for each tensor, and the bytes of the storages by key.

    A storage is uint8 (bytes). Raises one of `zips.ERRORS` where the file is damaged, needs anything else, or
    claims more than it has.
    """
    return _read_zip(file) if zips.begins_zip(file) else _read_pickles(file)


def _load(stream: IO[bytes], storages: _Storages) -> Any:
    return pickles.load(stream, _KNOWN, kind="checkpoint", persistent=storages.name)


def _flat(content: bytes) -> Tensor:
    if not content:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _read_zip(file: Path) -> tuple[Any, dict[str, Tensor]]:
    with zips.open_zip(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise ValueError("its records are larger unpacked than the file")
        names = archive.namelist()
        roots = [parts[1] for parts in (re.fullmatch(r"([^/]+)/data\.pkl", name) for name in names) if parts]
        if len(roots) != 1:
            raise ValueError(f"{len(roots)} entries data.pkl in it, not 1")
        order = f"{roots[0]}/byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("its numbers are not little-endian")
        storages = _Storages()
        content = _load(io.BytesIO(archive.read(f"{roots[0]}/data.pkl")), storages)
        return content, {key: _flat(archive.read(f"{roots[0]}/data/{key}")) for key in storages}


def _read_pickles(file: Path) -> tuple[Any, dict[str, Tensor]]:
    stream, storages = io.BytesIO(files.read_bytes(file, sys.maxsize)), _Storages()
    if (_load(stream, storages), _load(stream, storages)) != (MAGIC, VERSION):
        raise ValueError("not a file of torch.save")
    system, content, keys = (_load(stream, storages) for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("no list of its storages")
    held = {}
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        size = count * storages[key].dtype.itemsize
        if key in held or not 0 <= size <= file.stat().st_size:
            raise ValueError("a storage that is there twice, or larger than the file")
        held[key] = _flat(stream.read(size))
    return content, held
