"""The labels package as a zip or a folder, and what is wrong with others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prelar.utils.errors import UserError
from prelar.videos.labels import Label, find_labels, missing_ids, read_labels
from tests import archives

IDS = [str(number) for number in range(16)]


def folder(path: Path, **changed: bytes) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in {**archives.labels_files(IDS), **changed}.items():
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("shape", ["zip", "folder", "folder above"])
def test_zip_and_folder_say_the_same(tmp_path: Path, shape: str) -> None:
    if shape == "zip":
        path = archives.labels_zip(tmp_path / "any.name", archives.labels_files(IDS))
    else:
        path = folder(tmp_path / "labels")
    labels = read_labels(path.parent if shape == "folder above" else path)
    assert set(labels.clips) == set(IDS)
    assert labels.names["Pushing something across something"] == 1
    assert labels.clips["0"] == Label("train", "Opening something", 0)
    assert labels.clips["6"] == Label("validation", "Opening something", 0)
    assert labels.clips["7"] == Label("test", "Pushing something across something", 1)


def test_test_clips_need_no_answer(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "test-answers.csv").unlink()
    assert read_labels(path).clips["7"] == Label("test", None, None)
    (path / "test.json").unlink()
    assert "7" not in read_labels(path).clips


def test_labels_are_found_beside_the_parts(tmp_path: Path) -> None:
    archives.source(tmp_path, {"1": b"x"}, "zip")
    assert find_labels(sorted(tmp_path.iterdir())).name == archives.LABELS_ZIP
    (tmp_path / archives.LABELS_ZIP).unlink()
    with pytest.raises(UserError, match=r"ssv2\.labels"):
        find_labels(sorted(tmp_path.iterdir()))
    with pytest.raises(UserError, match="the source: no labels"):
        find_labels([])
    folder(tmp_path / "labels")
    assert find_labels(sorted(tmp_path.iterdir())) == tmp_path / "labels"


def test_an_unknown_template_has_no_label_id(tmp_path: Path) -> None:
    entries = [
        {"id": "0", "template": "Eating [something]", "label": "eating a pie", "placeholders": ["a pie"]}
    ]
    labels = read_labels(folder(tmp_path, **{"train.json": json.dumps(entries).encode()}))
    assert labels.clips["0"] == Label("train", "Eating something", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", b"{", r"train\.json is not JSON"),
        ("train.json", b'{"a": 1}', r"train\.json: expected a list"),
        ("train.json", b"[1]", r"train\.json: expected a list"),
        ("train.json", b'[{"template": "x"}]', r"train\.json: expected a list"),
        ("validation.json", b'[{"id": "0", "template": "x"}]', "clip 0 is in train and in validation"),
        ("labels.json", b"[]", r"labels\.json: expected an object"),
        ("labels.json", b'{"a": "b"}', r"labels\.json: expected an object"),
        ("labels.json", b'{"a": Infinity}', r"labels\.json: expected an object"),
        ("labels.json", b'{"a": 5000000000}', r"labels\.json: expected an object"),
        ("train.json", b"[" * 100_000, r"train\.json is not JSON"),
        ("train.json", b'[{"id": "", "template": "a"}]', r"train\.json: expected a list"),
        ("train.json", b'[{"id": null, "template": "a"}]', r"train\.json: expected a list"),
        ("train.json", b'[{"id": {}, "template": "a"}]', r"train\.json: expected a list"),
        ("train.json", b'[{"id": "1", "template": 1}]', r"train\.json: expected a list"),
        ("train.json", rb'[{"id": "\ud800", "template": "a"}]', r"train\.json is not JSON .*no Unicode"),
        ("train.json", b'[{"id": ' + b"1" * 5_000 + b"}]", r"train\.json is not JSON .*digits"),
        ("labels.json", rb'{"\udfff": 1}', r"labels\.json is not JSON .*no Unicode"),
        ("labels.json", b'{"a [b]": 1, "a b": 2}', r"labels\.json: expected an object"),
        ("labels.json", b'{"a": 1, "a": 2}', r"labels\.json is not JSON .*twice"),
        ("test-answers.csv", b"7;" + b"x" * 200_000, r"test-answers\.csv: not a table"),
    ],
)
def test_damaged_labels_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_labels(folder(tmp_path, **{name: content}))


def test_incomplete_packages_are_named(tmp_path: Path) -> None:
    (folder(tmp_path) / "validation.json").unlink()
    with pytest.raises(UserError, match=r"lacks validation\.json"):
        read_labels(tmp_path)
    (tmp_path / "not.zip").write_text("no")
    with pytest.raises(UserError, match="not a labels zip"):
        read_labels(tmp_path / "not.zip")
    locked = bytearray(archives.labels_zip(tmp_path / "locked.zip", archives.labels_files(IDS)).read_bytes())
    for begin, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = locked.find(begin)
        while place >= 0:
            locked[place + flags] |= 1
            place = locked.find(begin, place + 4)
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(UserError, match="not a labels zip"):
        read_labels(tmp_path / "locked.zip")
    with pytest.raises(UserError, match=r"no labels\.json"):
        read_labels(tmp_path / "nowhere")


def test_labels_are_printable(tmp_path: Path) -> None:
    entries = [{"id": "1\x1b[2J", "template": "Pushing\n[something] ü"}]
    changed = {
        "train.json": json.dumps(entries).encode(),
        "labels.json": rb'{"Pushing\nsomething \u00fc": 3}',
    }
    labels = read_labels(folder(tmp_path, **changed))
    assert labels.clips["1\\x1b[2J"] == Label("train", "Pushing\\nsomething ü", 3)


FORMER = "something-something-v2-"


@pytest.mark.parametrize("prefix", [FORMER, f"20bn-{FORMER}"])
@pytest.mark.parametrize("shape", ["zip", "folder", "beside"])
def test_labels_under_their_former_names(tmp_path: Path, shape: str, prefix: str) -> None:
    wanted = read_labels(folder(tmp_path / "now"))
    former = {f"{prefix}{name}": content for name, content in archives.labels_files(IDS).items()}
    source = tmp_path / "source"
    place = source if shape == "beside" else source / "annotations"
    place.mkdir(parents=True)
    if shape == "zip":
        archives.labels_zip(source / "labels.zip", former)
    else:
        for name, content in former.items():
            (place / name).write_bytes(content)
    assert read_labels(find_labels([*sorted(source.iterdir()), source])) == wanted


def test_former_names_beside_those_of_today(tmp_path: Path) -> None:
    wanted = read_labels(folder(tmp_path))
    copied = tmp_path / f"{FORMER}train.json"
    copied.write_bytes((tmp_path / "train.json").read_bytes())
    assert read_labels(tmp_path) == wanted
    copied.write_bytes(b"[]")
    with pytest.raises(UserError, match=r"holds two train\.json that differ"):
        read_labels(tmp_path)
    (tmp_path / "labels.json").unlink()
    with pytest.raises(UserError, match=r"holds two train\.json|lacks labels\.json"):
        read_labels(find_labels(sorted(tmp_path.iterdir())))


def test_odd_files_beside_labels_are_passed_over(tmp_path: Path) -> None:
    labels = archives.labels_zip(tmp_path / "z.zip", archives.labels_files(IDS))
    whole = labels.read_bytes()
    (tmp_path / "a.zip").write_bytes(whole.replace(b"PK\x01\x02", b"XX\x01\x02"))
    (tmp_path / "b.zip").write_bytes(whole[:300])
    (tmp_path / "train.json").write_bytes(b"captions of something else")
    os.mkfifo(tmp_path / "c.zip")
    assert find_labels(sorted(tmp_path.iterdir())) == labels
    with pytest.raises(UserError, match=r"a\.zip: not a labels zip"):
        read_labels(tmp_path / "a.zip")


def test_labels_of_absurd_sizes_are_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    with (tmp_path / "train.json").open("wb") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(UserError, match=r"train\.json: 1099511627776 bytes, more than"):
        read_labels(tmp_path)


def test_missing_ids(tmp_path: Path) -> None:
    labels = read_labels(folder(tmp_path))
    assert missing_ids(labels, set(IDS) - {"3", "6"}) == ["3", "6"]
