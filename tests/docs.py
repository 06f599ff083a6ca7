"""The documentation as data: its fenced blocks, the commands in them, and why some are not run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.conftest import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\n\Z")


MEMBER = """
  {name}:
    foreach: ${{mixtures.{name}}}
    do:
      cmd: exec python -m prelar join {name} ${{key}}
      deps: ['data/${{key}}.parquet', 'data/${{key}}.zarr']
      params: [mixtures.{name}]
      outs: ['data/members/{name}/${{key}}.json']
"""
"""The stage that a mixture needs in dvc.yaml."""


@dataclass(frozen=True)
class Block:
    """A fenced block. `reason` says why its commands are not run; None: a test runs them."""

    page: str
    language: str
    text: str
    reason: str | None


@dataclass(frozen=True)
class Command:
    """One command, in words. `reason` as of its block."""

    page: str
    words: tuple[str, ...]
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}" + (f" ({self.reason})" if self.reason else "")


def blocks() -> list[Block]:
    """All fenced blocks of the documentation, in order."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            reason = NOT_RUN.search(text[: match.start()])
            page = str(path.relative_to(ROOT))
            found.append(Block(page, match[1], match[2], reason[1] if reason else None))
    return found


def commands() -> list[Command]:
    """All commands of the blocks in bash, in order; what follows `;`, `&&` or `&` is one of its own."""
    found = []
    for block in blocks():
        if block.language != "bash":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= {";", "&"}:
                    if words:
                        found.append(Command(block.page, tuple(words), block.reason))
                    words = []
                else:
                    words.append(word)
    return found
