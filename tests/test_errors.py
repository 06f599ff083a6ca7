"""Errors as users see them: one line, a status, no trace."""

from __future__ import annotations

import pytest

from prelar.errors import UserError, one_line, run_main


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
    [(UserError("no disk; add one"), 2, "error: no disk; add one\n"), (KeyboardInterrupt(), 130, None)],
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
