"""Errors as users see them: one line, a status, no trace."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prelar.utils.errors import UserError, one_line, printable, run_main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b\tc "), "a b c"),
        (TimeoutError(), "TimeoutError"),
        (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
    ],
)
def test_error_becomes_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("no disk; add one"), 2, "error: no disk; add one\n"),
        (UserError("\x1b]0;x\x07\n.mp4: odd"), 2, "error: \\x1b]0;x\\x07\\n.mp4: odd\n"),
        (
            OSError(errno.EROFS, "Read-only file system", "data/.locks"),
            2,
            "error: data/.locks: Read-only file system; "
            "let this user read and write there, or work in a copy of the project\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: No space left on device; make room and run again\n",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "data/x"),
            2,
            "error: data/x: Disk quota exceeded; make room and run again\n",
        ),
        (
            FileExistsError(errno.EEXIST, "File exists", "notes.txt"),
            2,
            "error: notes.txt: File exists; name another place, or move what is there\n",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "notes.txt/set"),
            2,
            "error: notes.txt/set: Not a directory; name another place, or move what is there\n",
        ),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", ".x.partial", None, "x"),
            2,
            "error: x: Is a directory; name another place, or move what is there\n",
        ),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_main_ends_with_a_status(
    error: BaseException, status: int, told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == status
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and (told is None or printed == told)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("träume 01 – 日本.mp4", "träume 01 – 日本.mp4"),
        ("a\x1b[2Jb\r\n\t", "a\\x1b[2Jb\\r\\n\\t"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        (os.fsdecode(b"\xff.mp4"), "\\udcff.mp4"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(name: str, shown: str) -> None:
    assert printable(name) == shown
    shown.encode()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_stops_no_work(tmp_path: Path, stream: str) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from prelar.utils.errors import run_main\n"
        "def main():\n"
        "    for line in range(20000):\n"
        f"        print(line, file=sys.{stream}, flush=line % 1000 == 0)\n"
        "    Path(sys.argv[1]).write_text('whole')\n"
        "run_main(main)\n"
    )
    read, write = os.pipe()
    begun = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "work")],
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write},
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    told = begun.communicate(timeout=60)
    assert begun.returncode == 0 and not any(told)
    assert (tmp_path / "work").read_text() == "whole"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x" * 20, "x" * 10 + "…"),
        ("\n" * 20, "\\n" * 5 + "…"),
    ],
)
def test_text_from_elsewhere_is_escaped_and_cut_once(text: str, shown: str) -> None:
    assert printable(text, 10) == printable(shown, 10) == shown


def test_messages_are_printable() -> None:
    assert str(UserError("a\udcffb: no such file")) == "a\\udcffb: no such file"
    assert one_line(ValueError("a\x1b[2J")) == "a\\x1b[2J"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("jinja2.ext", "run: pip install 'prelar[pipeline]'"),
        ("great_expectations", "run: pip install 'prelar[pipeline]'"),
        ("mujoco", "run: pip install 'prelar[sim]'"),
        ("unheard_of", None),
        ("prelar.nothing", None),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, said: str | None
) -> None:
    needed = [
        "torch>=2",
        "mujoco==3.3.0; extra == 'all'",
        'Jinja2>=3; extra == "pipeline"',
        "great-expectations>=1 ; extra == 'pipeline'",
        "mujoco==3.3.0; extra == 'sim'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)

    def main() -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    if said is None:
        with pytest.raises(ModuleNotFoundError):
            run_main(main)
    else:
        with pytest.raises(SystemExit, match="2"):
            run_main(main)
        assert capsys.readouterr().err == f"error: {module} is not installed; {said}\n"


def test_a_package_that_a_checkout_lacks_is_set_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise ModuleNotFoundError("No module named 'h5py'", name="h5py")

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    with pytest.raises(SystemExit, match="2"):
        run_main(main)
    assert "error: h5py is not installed; run `make setup`" in capsys.readouterr().err
