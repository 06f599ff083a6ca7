"""Zips from elsewhere: good ones open, and all that is wrong with others is among the errors told."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from prelar.utils import zips


def packed(method: int = zipfile.ZIP_DEFLATED, count: int = 3) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", method) as archive:
        for number in range(count):
            archive.writestr(f"{number}.txt", np.random.default_rng(number).bytes(2000))
    return held.getvalue()


def contents(path: Path) -> list[bytes]:
    with zips.open_zip(path) as archive:
        return [archive.read(name) for name in archive.namelist()]


def test_a_good_zip_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(packed())
    assert contents(tmp_path / "a.zip") == [np.random.default_rng(n).bytes(2000) for n in range(3)]


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_whatever_is_wrong_is_among_the_errors(tmp_path: Path, method: int) -> None:
    whole, random, path = packed(method), np.random.default_rng(method), tmp_path / "a.zip"
    good = 0
    for _ in range(150):
        broken = bytearray(whole)
        for place in random.integers(0, len(whole), random.integers(1, 4)):
            broken[place] = random.integers(256)
        path.write_bytes(broken[: random.integers(len(whole))] if random.random() < 0.2 else broken)
        try:
            contents(path)
            good += 1
        except zips.ERRORS:
            pass
    assert good < 150


def test_a_directory_is_bounded_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed(count=20))
    monkeypatch.setattr(zips, "MAX_DIRECTORY", 500)
    with pytest.raises(ValueError, match="a directory of"):
        zips.open_zip(path)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(packed().replace(b"1.txt", b"0.txt"))
    with pytest.raises(ValueError, match="twice"):
        zips.open_zip(path)


def test_an_unknown_compression_is_among_the_errors(tmp_path: Path) -> None:
    broken, path = bytearray(packed()), tmp_path / "a.zip"
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        begin = broken.index(mark) + place
        broken[begin : begin + 2] = struct.pack("<H", 99)
    path.write_bytes(broken)
    with pytest.raises(zips.ERRORS):
        contents(path)


def test_what_claims_more_bytes_than_the_file_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"content")
    content = path.read_bytes()
    at = content.rindex(b"PK\x01\x02") + 20
    path.write_bytes(content[:at] + (1 << 31).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ValueError, match="more bytes than the file has"):
        zips.open_zip(path)
