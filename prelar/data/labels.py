"""The labels of Something-Something V2: which split and which label each clip has."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prelar.errors import UserError

SPLITS = ("train", "validation", "test")
NEEDED = ("labels.json", "train.json", "validation.json")
OPTIONAL = ("test.json", "test-answers.csv")
MAX_BYTES = 256 << 20
MAX_NAMES = 1 << 31


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


def find_labels(paths: Iterable[Path]) -> Path:
    """The labels zip, or the folder of labels.json, among `paths`. Raises `UserError` if there is none."""
    places = list(paths)
    found = seek_labels(places)
    if found is None:
        where = places[0].parent if places else "the source"
        raise UserError(f"{where}: no labels (a zip or a folder with labels.json); set ssv2.labels")
    return found


def seek_labels(places: Sequence[Path]) -> Path | None:
    """The labels zip, or the folder of labels.json, among `places`, None if there is none."""
    for path in places:
        if path.is_dir() and (path / NEEDED[0]).is_file():
            return path
        if path.name == NEEDED[0]:
            return path.parent
    for path in places:
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(Path(name).name == NEEDED[0] for name in archive.namelist()):
                    return path
    return None


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
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for info in archive.infolist():
                name = Path(info.filename).name
                if name in NEEDED + OPTIONAL:
                    if info.file_size > MAX_BYTES:
                        raise UserError(
                            f"{path}: {name} has {info.file_size} bytes; this is not a labels package"
                        )
                    found[name] = archive.read(info)
            return found
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError):
        raise UserError(f"{path}: not a labels zip; get the labels package again") from None


def _from_folder(path: Path) -> dict[str, bytes]:
    folder = path if (path / NEEDED[0]).is_file() else path / "labels"
    if not folder.is_dir():
        raise UserError(f"{path}: no labels.json there; set ssv2.labels to the labels zip or folder")
    return {name: (folder / name).read_bytes() for name in NEEDED + OPTIONAL if (folder / name).is_file()}


def _parsed(path: Path, name: str, held: dict[str, bytes]) -> Any:
    try:
        return json.loads(held[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {name} is not JSON ({error}); get the labels package again") from None


def _names(content: Any) -> dict[str, int]:
    try:
        names = {bare(name): int(number) for name, number in content.items()}
        if any(not 0 <= number < MAX_NAMES for number in names.values()):
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
            template = entry.get("template")
            yield str(entry["id"]), bare(template) if template is not None else None
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
    """A template as labels.json has it: without square brackets."""
    return template.replace("[", "").replace("]", "")


def missing_ids(labels: Labels, held: Sequence[str] | set[str]) -> list[str]:
    """Ids that the labels files name and `held` lacks, in the order of the files."""
    present = set(held)
    return [identity for identity in labels.clips if identity not in present]
