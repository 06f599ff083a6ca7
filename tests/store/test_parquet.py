"""Tables from elsewhere: those of the right columns are read, and none takes more than its size allows."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prelar.store.parquet import read_parquet

SCHEMA = pa.schema(
    [pa.field("id", pa.string(), nullable=False), pa.field("n", pa.int64()), pa.field("x", pa.float64())]
)


def written(table: pa.Table, **options: object) -> bytes:
    held = io.BytesIO()
    pq.write_table(table, held, **options)
    return held.getvalue()


def rows(count: int, text: str | None = None) -> pa.Table:
    names = [f"a clip of some name {number}" if text is None else text for number in range(count)]
    numbers, shares = np.arange(count), np.random.default_rng(0).normal(size=count)
    return pa.Table.from_arrays([pa.array(names), pa.array(numbers), pa.array(shares)], schema=SCHEMA)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd"},
        {"compression": "none", "use_dictionary": False},
        {"row_group_size": 100, "store_schema": False},
        {"data_page_version": "2.0", "data_page_size": 500, "write_page_checksum": True},
        {"write_statistics": False, "write_page_index": True},
    ],
)
def test_tables_of_any_writing_are_read(options: dict[str, object]) -> None:
    table = rows(3000)
    assert read_parquet(written(table, **options), SCHEMA).equals(table)
    assert read_parquet(written(table.slice(0, 0), **options), SCHEMA).num_rows == 0


def repeated(count: int, text: str) -> pa.Table:
    """Rows that are all the same, which take next to no room in a file."""
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))
    return pa.table({"id": texts, "n": pa.nulls(count, pa.int64()), "x": pa.nulls(count, pa.float64())})


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: written(repeated(3_000_000, "x"), store_schema=False), "3000000 rows in"),
        (lambda: written(repeated(9_000, "x" * 90_000), store_schema=False), "more text"),
        (lambda: written(rows(40, "x" * (5 << 20)), compression="zstd", use_dictionary=False), "pages"),
        (lambda: written(rows(9), use_dictionary=False, column_encoding={"id": "DELTA_BYTE_ARRAY"}), "pages"),
        (lambda: written(rows(9).drop_columns("n")), "columns of another version"),
        (lambda: written(rows(9).cast(pa.schema([*list(SCHEMA)[:2], ("x", pa.float32())]))), "other types"),
        (lambda: written(rows(9))[:-1], "magic"),
    ],
)
def test_what_stands_for_more_than_it_may_is_refused(made: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_parquet(made(), SCHEMA)  # type: ignore[operator]


def test_a_footer_with_any_byte_changed_ends_no_process() -> None:
    """Arrow may end the process over statistics that do not fit, where it is asked for a column."""
    whole = written(rows(3))
    size = int.from_bytes(whole[-8:-4], "little")
    read = 0
    for at in range(len(whole) - 8 - size, len(whole) - 8):
        for bit in (1, 2, 64):
            try:
                read_parquet(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :], SCHEMA)
                read += 1
            except ValueError:
                pass
    assert read
