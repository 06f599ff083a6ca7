"""Small tables of numbers as tab-separated text, the form that DVC plots."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prelar.utils.errors import UserError
from prelar.utils.files import write_text


def write_tsv(path: Path, columns: Mapping[str, Sequence[float]]) -> None:
    """Write named columns of equal length, whole numbers without a point, others to nine significant digits.

    Raises:
        ValueError: the columns differ in length.
    """
    lines = ["\t".join(columns)]
    for row in zip(*columns.values(), strict=True):
        lines.append("\t".join(_cell(value) for value in row))
    write_text(path, "\n".join(lines) + "\n")


def read_tsv(path: Path) -> dict[str, list[float]]:
    """Read named columns of numbers; an empty cell is not a number.

    Raises:
        UserError: a row has too few or too many cells, or a cell is not a number.
    """
    return parse_tsv(path.read_text(encoding="utf-8"), path)


def parse_tsv(text: str, path: Path) -> dict[str, list[float]]:
    """What `read_tsv` reads, of a text; `path` names it in errors. Raises `UserError` as that does."""
    rows = list(csv.reader(io.StringIO(text), delimiter="\t"))
    if not rows:
        return {}
    names, columns = rows[0], [[] for _ in rows[0]]  # type: tuple[list[str], list[list[float]]]
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(names):
            raise UserError(
                f"{path}:{line}: {len(row)} cells under {len(names)} headings; run the stage again"
            )
        for column, cell in zip(columns, row, strict=True):
            try:
                column.append(float(cell) if cell else math.nan)
            except ValueError:
                raise UserError(f"{path}:{line}: {cell!r} is not a number; run the stage again") from None
    return dict(zip(names, columns, strict=True))


def _cell(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.9g}"


def evenly_spaced_indices(count: int, limit: int) -> npt.NDArray[np.int64]:
    """At most `limit` of the numbers below `count`, evenly spread, in order: int64 (limit or fewer,).

    The first and the last are among them where there are two or more.
    """
    return np.linspace(0, count - 1, min(limit, count)).round().astype(np.int64)
