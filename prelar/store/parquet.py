"""Reading a Parquet table that may come from elsewhere, in memory that its file's size bounds.

A small file can stand for gigabytes: pages are compressed, runs and dictionaries repeat values, and a footer
says what it likes. So the headers of all pages are looked at before any page is unpacked, texts are read as
dictionaries, and their length is known before they are written out.
"""

from __future__ import annotations

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
CONTAINERS = 100_000


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
        _check_pages(content, footer, most)
        table = file.read()
        if table.num_rows != footer.num_rows:
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


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of the texts of a column of dictionaries, written out."""
    lengths = (pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks)
    return sum(pc.sum(pc.cast(found, pa.int64())).as_py() or 0 for found in lengths)


def _check_pages(content: bytes, footer: pq.FileMetaData, most: int) -> None:
    """Raise `ValueError` where the rows, or the pages unpacked, are more than the file may stand for."""
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != footer.num_rows or sum(rows) > max(FREE_ROWS, len(content)):
        raise ValueError(f"{footer.num_rows} rows in {len(content)} bytes")
    filled = [group for group in groups if group.num_rows]
    columns = [group.column(number) for group in filled for number in range(group.num_columns)]
    sizes = [column.total_compressed_size for column in columns]
    if min(sizes, default=0) < 0 or sum(sizes) > len(content):
        raise ValueError("columns that are larger than the file")
    unpacked = 0
    for column, packed in zip(columns, sizes, strict=True):
        start = column.data_page_offset
        if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < start:
            start = column.dictionary_page_offset
        for size, encoding in _pages(content, start, start + packed):
            unpacked += size
            if encoding not in ENCODINGS or unpacked > most:
                raise ValueError("pages that no writer of stores makes")


def _pages(content: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    """The bytes when unpacked, and the encoding, of each page of a column that lies from `at` to `end`."""
    if not 0 <= at <= end <= len(content):
        raise ValueError("a column outside of the file")
    while at < end:
        header = _Header(content, at)
        fields = header.struct()
        about, place = next(
            (fields[number], place) for number, place in ((5, 2), (7, 2), (8, 4)) if number in fields
        )
        unpacked, packed = fields[2], fields[3]
        at = header.at + packed
        if min(unpacked, packed) < 0 or at > end:
            raise ValueError("a damaged page")
        yield unpacked, about[place]


class _Header:
    """Reads the header of a page: a struct in Thrift's compact protocol, of which only numbers are kept."""

    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at = content, at

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct by number."""
        if depth > 4:
            raise ValueError("a damaged page")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.struct(depth + 1)
        if kind not in (3, 7, 8):
            raise ValueError("a damaged page")
        length = {3: 1, 7: 8}.get(kind) or self._varint()
        self.at += length
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
