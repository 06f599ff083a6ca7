"""Small clips and archives in the shape of Something-Something V2, made with ffmpeg's own sources."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import imageio_ffmpeg

FOLDER = "20bn-something-something-v2"
LABELS_ZIP = "20bn-something-something-download-package-labels.zip"
TEMPLATES = ("Opening [something]", "Pushing [something] across [something]", "Turning [something]")


@functools.cache
def clip(
    frames: int = 12,
    width: int = 96,
    height: int = 64,
    rate: str = "12",
    source: str = "testsrc2",
    filters: str = "null",
    options: tuple[str, ...] = (),
    inputs: tuple[str, ...] = (),
    suffix: str = ".webm",
) -> bytes:
    """The bytes of a VP9 webm clip; `filters` work on the pictures, `options` are ffmpeg's for the output."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"clip{suffix}"
        command = [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"),
            *("-f", "lavfi", "-i", f"{source}=size={width}x{height}:rate={rate}", *inputs),
            *("-frames:v", str(frames), "-vf", filters, "-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p"),
            *("-deadline", "realtime", "-cpu-used", "8", "-b:v", "200k", "-threads", "1"),
            *("-fflags", "+bitexact", "-flags", "+bitexact", *options, str(target)),
        ]
        subprocess.run(command, check=True, capture_output=True)
        return target.read_bytes()


def clips(count: int, shortest: int = 8) -> dict[str, bytes]:
    """`count` good clips of differing widths and lengths, by id."""
    widths = (96, 85, 64, 113)
    return {
        str(100 + 7 * number): clip(frames=shortest + 3 * (number % 5), width=widths[number % 4])
        for number in range(count)
    }


def labels_files(ids: Sequence[str], templates: Sequence[str] = TEMPLATES) -> dict[str, bytes]:
    """The files of the labels package: ids dealt to train, validation and test, 6 : 1 : 1."""
    splits: dict[str, list[dict[str, object]]] = {"train": [], "validation": [], "test": []}
    answers = io.StringIO()
    for number, identity in enumerate(ids):
        split = {6: "validation", 7: "test"}.get(number % 8, "train")
        template = templates[number % len(templates)]
        if split == "test":
            splits[split].append({"id": identity})
            csv.writer(answers, delimiter=";").writerow(
                [identity, template.replace("[", "").replace("]", "")]
            )
        else:
            label = template.replace("[something]", "a box")
            splits[split].append(
                {"id": identity, "label": label, "template": template, "placeholders": ["a box"]}
            )
    names = {name.replace("[", "").replace("]", ""): str(number) for number, name in enumerate(templates)}
    files = {f"{split}.json": json.dumps(entries).encode() for split, entries in splits.items()}
    return {
        "labels.json": json.dumps(names).encode(),
        "test-answers.csv": answers.getvalue().encode(),
        **files,
    }


def labels_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write the labels package."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"labels/{name}", content)
    return path


def entry(name: str, content: bytes = b"", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of a tar; `attributes` are those of `tarfile.TarInfo`."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


def tar_gz(entries: Sequence[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A gzip'd tar of the entries."""
    held = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=held, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=form) as archive,
    ):
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return held.getvalue()


def clips_tar(contents: Mapping[str, bytes]) -> bytes:
    """The archive of webm clips, given by id."""
    folder = entry(f"{FOLDER}/", type=tarfile.DIRTYPE)
    return tar_gz([folder, *(entry(f"{FOLDER}/{name}.webm", content) for name, content in contents.items())])


def pieces(data: bytes, count: int) -> list[bytes]:
    """The data cut into `count` pieces of about the same size."""
    size = -(-len(data) // count)
    return [data[begin : begin + size] for begin in range(0, len(data), size)]


def write_parts(folder: Path, data: bytes, shape: str, count: int = 3) -> list[Path]:
    """Write an archive as `count` parts in a shape: zip (wrapped), raw, or named (raw, called .zip)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, piece in enumerate(pieces(data, count)):
        name = f"{FOLDER}-{number:02d}"
        path = folder / (name if shape == "raw" else f"{name}.zip")
        if shape == "zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(name, piece)
        else:
            path.write_bytes(piece)
        paths.append(path)
    return paths


def source(folder: Path, contents: Mapping[str, bytes], shape: str = "raw", count: int = 3) -> Path:
    """A whole source folder: parts and labels zip for the given clips."""
    write_parts(folder, clips_tar(contents), shape, count)
    labels_zip(folder / LABELS_ZIP, labels_files(list(contents)))
    return folder
