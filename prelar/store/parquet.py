"""Reading a Parquet table that may come from elsewhere, in memory bounded by the size of its file.

A small file can stand for gigabytes: pages are compressed, runs and dictionaries repeat values, and a footer
says what it likes. So the headers of all pages are looked at before any page is unpacked, texts are read as
dictionaries, and their length is known before they are written out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prelar.utils.errors import one_line

ENCODINGS = {0, 2, 3, 8}
"""PLAIN, PLAIN_DICTIONARY, RLE and RLE_DICTIONARY; others build long values from the ones before."""
FREE_ROWS, FREE_BYTES = 10_000, 64 << 20
RATIO = 100
CONTAINERS, MAX_FOOTER = 100_000, 16 << 20


def read_parquet(content: bytes, schema: pa.Schema) -> pa.Table:
    """The table of a Parquet file, which must have exactly the columns of `schema`.

    Raises `ValueError` with a short reason where it has not, is damaged, or stands for more than it may:
    beyond `FREE_ROWS` a row a byte of the file, and beyond `FREE_BYTES` `RATIO` bytes a byte.
    """
    most = FREE_BYTES + RATIO * len(content)
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    try:
        source = pa.BufferReader(content)
        footer = pq.ParquetFile(source, thrift_container_size_limit=CONTAINERS).metadata
        if footer.schema.names != schema.names:
            raise ValueError("the columns of another version")
        file = pq.ParquetFile(source, metadata=footer, read_dictionary=texts)
        wanted = [pa.dictionary(pa.int32(), f.type) if f.name in texts else f.type for f in schema]
        if file.schema_arrow.types != wanted:
            raise ValueError("columns of other types")
        rows, table = _check_pages(content, most), file.read()
        if table.num_rows != rows:
            raise ValueError("other rows than its footer names")
        if sum(_text_bytes(table[name]) for name in texts) > most:
            raise ValueError("more text than a file of its size may stand for")
        if lacking := [f.name for f in schema if not f.nullable and table[f.name].null_count]:
            raise ValueError(f"no value in a row of {lacking[0]}")
        table = table.cast(schema)
        table.validate(full=True)
    except Exception as error:  # Arrow raises many kinds for a damaged file
        raise ValueError(one_line(error)[:300]) from None
    return table


def open_parquet(content: bytes, most: int) -> pq.ParquetFile:
    """A Parquet file of whatever columns, opened after a look at its pages; lists of texts are dictionaries.

    Raises `ValueError` with a short reason where it is damaged, or its pages unpacked, or its values at eight
    bytes each, are more than `most` bytes.
    """
    try:
        footer = pq.ParquetFile(pa.BufferReader(content), thrift_container_size_limit=CONTAINERS).metadata
        _check_pages(content, most, most // 8)
        leaves = [footer.schema.column(number) for number in range(len(footer.schema.names))]
        texts = [
            leaf.path for leaf in leaves if leaf.max_repetition_level and leaf.physical_type == "BYTE_ARRAY"
        ]
        return pq.ParquetFile(pa.BufferReader(content), metadata=footer, read_dictionary=texts)
    except Exception as error:  # Arrow raises many kinds for a damaged file
        raise ValueError(one_line(error)[:300]) from None


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of the texts of a column of dictionaries, written out."""
    lengths = (pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks)
    return sum(pc.sum(pc.cast(found, pa.int64())).as_py() or 0 for found in lengths)


def _check_pages(content: bytes, most: int, values: float = math.inf) -> int:
    """How many rows there are. Raises `ValueError` where they, the pages unpacked, or their `values` are more
    than may be.

    Arrow's own view of a damaged footer may end the process, so the footer is read here.
    """
    size = int.from_bytes(content[-8:-4], "little")
    if size > min(MAX_FOOTER, len(content)):
        raise ValueError(f"a footer of {size} bytes")
    groups = _Thrift(content, len(content) - 8 - size).struct()[4]
    rows = [group[3] for group in groups]
    if min(rows, default=0) < 0 or sum(rows) > max(FREE_ROWS, len(content)):
        raise ValueError(f"{sum(rows)} rows in {len(content)} bytes")
    columns = [column[3] for group in groups if group[3] for column in group[1]]
    if min((column[7] for column in columns), default=0) < 0 or sum(c[7] for c in columns) > len(content):
        raise ValueError("columns that are larger than the file")
    unpacked = held = 0
    for column in columns:
        start, dictionary = column[9], column.get(11, 0)
        start = dictionary if 0 < dictionary < start else start
        for size, encoding, count in _pages(content, start, start + column[7]):
            unpacked, held = unpacked + size, held + count
            if encoding not in ENCODINGS or unpacked > most or not 0 <= held <= values:
                raise ValueError("pages that no writer of stores makes")
    return sum(rows)


def _pages(content: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Bytes when unpacked, encoding and number of values of each page of a column from `at` to `end`."""
    if not 0 <= at <= end <= len(content):
        raise ValueError("a column outside of the file")
    while at < end:
        header = _Thrift(content, at)
        fields = header.struct()
        about, place = next(
            (fields[number], place) for number, place in ((5, 2), (7, 2), (8, 4)) if number in fields
        )
        unpacked, packed = fields[2], fields[3]
        at = header.at + packed
        if min(unpacked, packed) < 0 or at > end:
            raise ValueError("a damaged page")
        yield unpacked, about[place], about[1]


class _Thrift:
    """Reads structs in Thrift's compact protocol: footers and headers of pages. Texts are passed over."""

    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at = content, at

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct by number."""
        if depth > 16:
            raise ValueError("a damaged struct")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.struct(depth + 1)
        if kind == 9:
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind not in (1, 2, 3, 7, 8):
            raise ValueError("a damaged struct")
        length = {1: 1, 2: 1, 3: 1, 7: 8}.get(kind) or self._varint()
        self.at += length
        if self.at > len(self.content):
            raise ValueError("a damaged struct")
        return None

    def _byte(self) -> int:
        self.at += 1
        return self.content[self.at - 1]

    def _varint(self) -> int:
        found = shift = 0
        while (byte := self._byte()) > 127 and shift < 63:
            found, shift = found | (byte & 127) << shift, shift + 7
        return found | byte << shift

    def _integer(self) -> int:
        found = self._varint()
        return (found >> 1) ^ -(found & 1)
