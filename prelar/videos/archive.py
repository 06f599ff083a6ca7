"""Something-Something V2 as it is met on disks: byte-split archive parts, or a folder of extracted clips.

The videos are one gzip'd tar, split into pieces. A piece comes raw, raw under a `.zip` name, or wrapped in a
real zip. Content decides, never the name: the first piece is a gzip stream of a tar of webm clips. The pieces
in order are read as one stream: nothing is unpacked twice and the archive is not copied. What a tar may hold
but a data set has no use for (links, devices, paths that leave the folder, absurd sizes and names) is refused
by name and reason, and the reading goes on.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from prelar.utils import files, zips
from prelar.utils.errors import UserError, one_line
from prelar.videos.decode import Part

ENDINGS = (".webm", ".mp4", ".m4v", ".mov", ".mkv", ".avi")
MAX_CLIP = 64 << 20
MAX_NAME = 200
MAX_EXTENSION = 64 << 10
MAX_EXTENSIONS = 8  # before an entry
MAX_ENTRIES = 2_000_000
LOOKED_AT = 64 << 10  # bytes of a gzip stream that tell what is in it
BLOCK = 512

_ENDINGS = re.compile(r"(\.(zip|gz|tgz|tar|bin))+$", re.IGNORECASE)
_NUMBERED = re.compile(r"^(.*?)[-_.](?:part)?(\d{1,4})$")
_LENGTH = re.compile(rb"(\d{1,7}) ")
_SIZE = re.compile(rb"\d{1,19}")
_REFUSED = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


@dataclasses.dataclass(frozen=True)
class Member:
    """One clip of a source: its id and the bytes of its file, or None and why it was refused.

    A clip of someone's own video has no bytes of its own, but the `part` of a file and that file's `sha256`.
    """

    id: str
    content: bytes | None
    reason: str | None = None
    part: Part | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of the archive: a file, or the file `inner` inside a zip."""

    path: Path
    inner: str | None
    size: int

    def open(self) -> IO[bytes]:
        """The piece's bytes as a stream. Raises one of `zips.ERRORS`, and so may reading it."""
        if self.inner is None:
            return self.path.open("rb")
        return zips.open_zip(self.path).open(self.inner)

    @property
    def name(self) -> str:
        """The name that orders it among the pieces."""
        return Path(self.inner).name if self.inner else self.path.name


# --- Which files are the pieces, and in which order -------------------------------------------------------


def find_pieces(paths: Sequence[Path]) -> list[Piece]:
    """The archive's pieces among `paths`, in order. Raises `UserError` where they are none, or not complete.

    Files that are neither a piece nor look like one (labels, notes, other archives) are passed over.
    """
    pieces = [piece for path in paths if (piece := _sniff(path)) is not None]
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(_split(piece.name)[0], []).append(piece)
    begun = {stem: group for stem, group in groups.items() if any(_begins_archive(piece) for piece in group)}
    if not begun:
        where = paths[0].parent if paths else "the source"
        raise UserError(
            f"{where}: no archive part that begins a gzip stream of webm clips; is the first part there, and "
            "whole?"
        )
    if len(begun) > 1:
        raise UserError(
            f"{paths[0].parent}: parts of several archives ({', '.join(sorted(begun))}); keep one"
        )
    ((stem, group),) = begun.items()
    return _ordered(stem, group)


def first_piece(paths: Sequence[Path]) -> Path | None:
    """The file among `paths` that begins an archive of clips, None where there is none."""
    return next(
        (path for path in paths if (piece := _sniff(path)) is not None and _begins_archive(piece)),
        None,
    )


def _ordered(stem: str, group: list[Piece]) -> list[Piece]:
    numbered = sorted(((_split(piece.name)[1], piece) for piece in group), key=lambda pair: pair[0])
    numbers = [number for number, _ in numbered]
    for before, after in itertools.pairwise(numbers):
        if before == after:
            raise UserError(f"{stem}: part {after:02d} is there twice; keep one of them")
        if after != before + 1:
            raise UserError(f"{stem}: part {before + 1:02d} is missing; download it")
    ordered = [piece for _, piece in numbered]
    if not _begins_archive(ordered[0]):
        raise UserError(f"{ordered[0].path}: does not begin a gzip stream; the part before it is missing")
    return ordered


def _split(name: str) -> tuple[str, int]:
    """A piece's name without its ending as (stem, number); -1 where it has no number."""
    bare = _ENDINGS.sub("", name)
    match = _NUMBERED.match(bare)
    return (match[1], int(match[2])) if match else (bare, -1)


def _sniff(path: Path) -> Piece | None:
    """The piece that a file holds, judged by its content, or None.

    A zip that cannot be opened is held for bytes that only look like one.
    """
    if path.name.startswith(".") or not path.is_file():
        return None
    if zips.begins_zip(path):
        try:
            with zips.open_zip(path) as archive:
                held = [info for info in archive.infolist() if not info.is_dir()]
        except zips.ERRORS:
            return Piece(path, None, path.stat().st_size)
        if len(held) != 1 or held[0].flag_bits & 1:
            return None
        return Piece(path, held[0].filename, held[0].file_size)
    if path.suffix.lower() in {".json", ".csv", ".txt", ".md", ".pdf", ".html", ".webm"}:
        return None
    return Piece(path, None, path.stat().st_size)


def _begins_archive(piece: Piece) -> bool:
    """Whether a piece begins a gzip stream of a tar whose first file is a webm clip, so far as it tells."""
    try:
        with piece.open() as handle:
            begin = handle.read(LOOKED_AT)
        if not begin.startswith(b"\x1f\x8b\x08"):
            return False
        unpacking = zlib.decompressobj(wbits=31)
        tar = unpacking.decompress(begin, LOOKED_AT)
    except zips.ERRORS:
        return False
    try:
        for info, name, size in _headers(stream := io.BytesIO(tar)):
            if info.isreg() and not name.endswith("/"):
                return name.lower().endswith(".webm")
            _skip(stream, size)
    except UserError:
        return False
    except EOFError:
        return not unpacking.eof
    return False


# --- The pieces as one stream -----------------------------------------------------------------------------


class PieceStream(io.RawIOBase):
    """The pieces' bytes, one after the other; `progress(n)` hears of every n bytes read."""

    def __init__(
        self, pieces: Sequence[Piece], progress: Callable[[int], object] = lambda count: None
    ) -> None:
        self._pieces = list(pieces)
        self._progress = progress
        self._current: IO[bytes] | None = None
        self.name = ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while True:
            if self._current is None:
                if not self._pieces:
                    return 0
                piece = self._pieces.pop(0)
                self.name = str(piece.path)
                self._current = piece.open()
            data = self._current.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                self._progress(len(data))
                return len(data)
            self._current.close()
            self._current = None

    def close(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None
        super().close()


def archive_members(
    pieces: Sequence[Piece], progress: Callable[[int], object] = lambda count: None
) -> Iterator[Member]:
    """The clips in the archive, in its order. Raises `UserError` where it is damaged or ends early."""
    raw = PieceStream(pieces, progress)
    try:
        with raw, gzip.GzipFile(fileobj=io.BufferedReader(raw, 1 << 20)) as unzipped:
            yield from tar_members(io.BufferedReader(unzipped, 1 << 20))
    except EOFError:
        raise UserError(
            f"{raw.name}: the archive ends early; its last part is missing or cut short"
        ) from None
    except zips.ERRORS as error:
        raise UserError(f"{raw.name}: damaged ({one_line(error)}); download this part again") from None


def tar_members(stream: IO[bytes]) -> Iterator[Member]:
    """The regular files of a tar read as a stream, and what was refused. Ids are unique."""
    seen: dict[str, int] = {}
    for name, member in _entries(stream):
        yield _unique(member if member.reason else _named(name, member), seen)
        if len(seen) > MAX_ENTRIES:
            raise UserError(
                f"the archive holds more than {MAX_ENTRIES} files; this is not Something-Something V2"
            )


def _entries(stream: IO[bytes]) -> Iterator[tuple[str, Member]]:
    """Name and content of each entry that is not a folder."""
    for info, name, size in _headers(stream):
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise UserError("the archive holds a sparse file; this is not Something-Something V2")
        if info.isreg() and not name.endswith("/"):
            held = _content(stream, size, MAX_CLIP)
            reason = None if held is not None else f"refused: {size} bytes, more than a clip of {MAX_CLIP}"
            yield name, Member(_printable(name), held, reason)
        elif info.type in _REFUSED:
            yield name, Member(_printable(name), None, f"refused: {_REFUSED[info.type]}")
        elif info.type != tarfile.DIRTYPE:
            _skip(stream, size)


def _headers(stream: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, str, int]]:
    """The header, the whole name and the size of each entry; whoever asks takes or skips what follows it."""
    name: str | None = None
    size: int | None = None
    extensions = 0
    while (info := _header(stream)) is not None:
        if info.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            yield info, name or info.name, info.size if size is None else size
            name, size, extensions = None, None, 0
            continue
        extensions += 1
        content = _content(stream, info.size, MAX_EXTENSION)
        if content is None or extensions > MAX_EXTENSIONS:
            found = f"a name of {info.size} bytes" if content is None else f"{extensions} names of one file"
            raise UserError(f"the archive holds {found}; this is not Something-Something V2")
        if info.type == tarfile.GNUTYPE_LONGNAME:
            name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        else:
            name, size = _extended(content, name)


def _header(stream: IO[bytes]) -> tarfile.TarInfo | None:
    """The next header, or None at the end of the archive, which is read to the end of the stream."""
    block = _exactly(stream, BLOCK)
    if not block.strip(b"\0"):
        while stream.read(1 << 20):
            pass
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise UserError(
            f"the archive is damaged ({error}); are its parts complete and of one archive?"
        ) from None
    if info.size < 0:
        raise UserError("the archive is damaged (a negative size); download it again")
    return info


def _extended(content: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Name and size from the records of a pax header; what it does not give stays as it was."""
    size: int | None = None
    begin = 0
    while begin < len(content):
        match = _LENGTH.match(content, begin)
        end = begin + int(match[1]) if match else 0
        if match is None or not match.end() <= end <= len(content):
            raise UserError("the archive is damaged (an unreadable pax header); download it again")
        key, _, value = content[match.end() : end - 1].partition(b"=")
        begin = end
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not _SIZE.fullmatch(value):
                raise UserError("the archive is damaged (an unreadable size); download it again")
            size = int(value)
    return name, size


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _content(stream: IO[bytes], size: int, limit: int) -> bytes | None:
    """An entry's bytes; None where they are more than `limit`, and then they are skipped."""
    if size > limit:
        _skip(stream, size)
        return None
    data = _exactly(stream, size)
    _exactly(stream, -size % BLOCK)
    return data


def _skip(stream: IO[bytes], size: int) -> None:
    left = size + -size % BLOCK
    while left:
        left -= len(_exactly(stream, min(left, 1 << 20)))


def _named(name: str, member: Member) -> Member:
    """A regular file under the id that its name gives, or refused for its name."""
    shown = _printable(name)
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        return Member(shown, None, "refused: its path leaves the folder")
    if len(name) > MAX_NAME:
        return Member(shown, None, f"refused: a name of {len(name)} characters")
    if not parts or not name.isascii() or not name.isprintable():
        return Member(shown, None, "refused: a name of other than plain characters")
    bare = PurePosixPath(parts[-1])
    return Member(bare.stem if bare.suffix.lower() in ENDINGS else bare.name, member.content)


def _printable(name: str) -> str:
    shown = ascii(name)[1:-1]
    return shown if len(shown) <= MAX_NAME else f"{shown[:MAX_NAME]}…"


def _unique(member: Member, seen: dict[str, int]) -> Member:
    """The member itself, or a refusal under another id where its id was seen before, and how often."""
    if member.id not in seen:
        seen[member.id] = 1
        return member
    identity = member.id
    while identity in seen:
        seen[member.id] += 1
        identity = f"{member.id}#{seen[member.id]}"
    seen[identity] = 1
    return Member(identity, None, member.reason or f"refused: {member.id} is there already")


# --- Extracted clips --------------------------------------------------------------------------------------


def find_clips(folder: Path, endings: Collection[str] = (".webm",)) -> list[Path]:
    """The files of clips under a folder of extracted clips, in the order of their numbers."""
    found = [path for path in visible_files(folder) if path.suffix.lower() in endings]
    return sorted(found, key=lambda path: (len(path.stem), path.stem, str(path)))


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, hidden ones and hidden folders left out. Links to folders are followed."""
    for path in files.walk(folder):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def folder_members(clips: Sequence[Path]) -> Iterator[Member]:
    """The clips in files, read one at a time. Ids are unique."""
    seen: dict[str, int] = {}
    for path in clips:
        yield _unique(_file_member(path), seen)


def _file_member(path: Path) -> Member:
    if not path.is_file():
        return Member(_printable(path.stem), None, "refused: not a regular file")
    size = path.stat().st_size
    if size > MAX_CLIP:
        return Member(_printable(path.stem), None, f"refused: {size} bytes, more than a clip of {MAX_CLIP}")
    try:
        return _named(path.name, Member(path.name, path.read_bytes()))
    except OSError as error:
        return Member(_printable(path.stem), None, f"cannot be read: {error.strerror}")
