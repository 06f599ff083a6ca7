"""The labels of Something-Something V2: which split and which label each clip has.

Their files are named as in the package of today, `labels.json`, or as until 2021,
`something-something-v2-labels.json`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prelar.utils import files, zips
from prelar.utils.errors import UserError, one_line, printable

SPLITS = ("train", "validation", "test")
NEEDED = ("labels.json", "train.json", "validation.json")
OPTIONAL = ("test.json", "test-answers.csv")
MAX_BYTES = 64 << 20
MAX_NAMES = 1 << 31

_FORMER = re.compile(r"(?:20bn-)?something-something-v2-")


@dataclasses.dataclass(frozen=True)
class Label:
    """What the labels files say of one clip. A test clip without an answer has no label."""

    split: str
    label: str | None
    label_id: int | None


@dataclasses.dataclass(frozen=True)
class Labels:
    """All labels: `clips` by id, `names` from label to label id."""

    clips: dict[str, Label]
    names: dict[str, int]


def find_labels(places: Sequence[Path], begin: Path | None = None) -> Path:
    """The labels zip, or the folder of labels.json, among `places`. Raises `UserError` if there is none.

    begin: the file that begins the archive that wants labels, where there is one. The last place, or the
    folder that it lies in, is named where they are missed.
    """
    found = seek_labels(places)
    if found is None:
        folders = (path if path.is_dir() else path.parent for path in reversed(places))
        where = next(folders, "the source")
        wanted = f" for the archive that {begin.name} begins" if begin else ""
        raise UserError(f"{where}: no labels (a zip or a folder with labels.json){wanted}; set ssv2.labels")
    return found


def seek_labels(places: Sequence[Path]) -> Path | None:
    """The labels zip, or the folder of labels.json, among `places`, None if there is none."""
    for path in places:
        if path.is_dir() and _in_folder(path):
            return path
        if _is_labels_name(path.name):
            return path.parent
    for path in places:
        if path.is_file() and zips.begins_zip(path):
            try:
                with zips.open_zip(path) as archive:
                    if any(_is_labels_name(Path(name).name) for name in archive.namelist()):
                        return path
            except zips.ERRORS:
                continue
    return None


def _is_labels_name(name: str) -> bool:
    """Whether a file of this name shows that labels are there."""
    plain = _FORMER.sub("", name, count=1)
    return plain == NEEDED[0] or (plain != name and plain in NEEDED + OPTIONAL)


def _in_folder(folder: Path) -> list[Path]:
    """The files of labels in a folder, none where nothing shows that there are labels."""
    try:
        entries = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:
        return []
    found = [path for path in entries if _FORMER.sub("", path.name, count=1) in NEEDED + OPTIONAL]
    return found if any(_is_labels_name(path.name) for path in found) else []


def read_labels(path: Path) -> Labels:
    """Read a labels zip or folder. Raises `UserError` that names the file and what is wrong in it."""
    held = _from_zip(path) if path.is_file() else _from_folder(path)
    missing = [name for name in NEEDED if name not in held]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; get the labels package again")
    names = _names(_parsed(path, "labels.json", held))
    clips: dict[str, Label] = {}
    for split in SPLITS:
        if f"{split}.json" in held:
            for identity, label in _entries(path, split, held):
                if identity in clips:
                    raise UserError(f"{path}: clip {identity} is in {clips[identity].split} and in {split}")
                clips[identity] = Label(split, label, names.get(label) if label else None)
    for identity, label in _answers(held.get("test-answers.csv", b"")):
        if identity in clips and clips[identity].split == "test":
            clips[identity] = Label("test", label, names.get(label))
    return Labels(clips, names)


def _from_zip(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with zips.open_zip(path) as archive:
            for info in archive.infolist():
                name = _FORMER.sub("", Path(info.filename).name, count=1)
                if name in NEEDED + OPTIONAL:
                    if info.file_size > MAX_BYTES:
                        raise UserError(
                            f"{path}: {name} has {info.file_size} bytes; this is not a labels package"
                        )
                    _add(path, found, name, archive.read(info))
    except zips.ERRORS as error:
        raise UserError(
            f"{path}: not a labels zip ({one_line(error)}); get the labels package again"
        ) from None
    return found


def _from_folder(path: Path) -> dict[str, bytes]:
    held = _in_folder(path) or _in_folder(path / "labels")
    if not held:
        raise UserError(f"{path}: no labels.json there; set ssv2.labels to the labels zip or folder")
    found: dict[str, bytes] = {}
    for file in held:
        try:
            _add(path, found, _FORMER.sub("", file.name, count=1), files.read_bytes(file, MAX_BYTES))
        except ValueError as error:
            raise UserError(f"{file}: {error}; get the labels package again") from None
    return found


def _add(path: Path, found: dict[str, bytes], name: str, content: bytes) -> None:
    if found.setdefault(name, content) != content:
        raise UserError(f"{path}: holds two {name} that differ; leave one of them there")


def _parsed(path: Path, name: str, held: dict[str, bytes]) -> Any:
    try:
        return files.parse_json(held[name])
    except ValueError as error:
        raise UserError(f"{path}: {name} is not JSON ({error}); get the labels package again") from None


def _names(content: Any) -> dict[str, int]:
    try:
        names = {bare(name): int(number) for name, number in content.items()}
        if len(names) < len(content) or any(not 0 <= number < MAX_NAMES for number in names.values()):
            raise ValueError
        return names
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise UserError(
            "labels.json: expected an object of label: number; get the labels package again"
        ) from None


def _entries(path: Path, split: str, held: dict[str, bytes]) -> Iterator[tuple[str, str | None]]:
    """Id and label of each clip of a split."""
    content = _parsed(path, f"{split}.json", held)
    try:
        for entry in content:
            identity, template = entry["id"], entry.get("template")
            if not isinstance(identity, (str, int)) or identity == "":
                raise TypeError
            yield printable(str(identity)), bare(template) if template is not None else None
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{path}: {split}.json: expected a list of objects with an id and a template"
        ) from None


def _answers(content: bytes) -> Iterator[tuple[str, str]]:
    try:
        for row in csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline=""), delimiter=";"):
            if len(row) == 2:
                yield row[0], bare(row[1])
    except csv.Error as error:
        raise UserError(f"test-answers.csv: not a table ({error}); get the labels package again") from None


def bare(template: str) -> str:
    """A template as labels.json has it: without square brackets; what is not printable is escaped."""
    return printable(template.replace("[", "").replace("]", ""))


def missing_ids(labels: Labels, held: set[str]) -> list[str]:
    """Ids that the labels files name and `held` lacks, in the order of the files."""
    return [identity for identity in labels.clips if identity not in held]
