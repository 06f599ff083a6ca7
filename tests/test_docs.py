"""The documentation: commands that parse, links that lead somewhere, a reference of params that is current.

Commands without a note `<!-- not run: reason -->` are run by tests/test_end_to_end.py. Those with one are
listed by `pytest tests/test_docs.py -k not_run -v`, and parsed here as all others are.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable

import pytest
from dvc.cli import parse_args
from ruamel.yaml import YAML

from prelar.__main__ import build_parser
from prelar.config import Config, keys, parse_yaml, read_yaml
from tests.conftest import ROOT, merge
from tests.docs import MEMBER, PAGES, Command, blocks, commands
from tools import params_page

COMMANDS = commands()
LANGUAGES = {"bash", "python", "mermaid", "yaml"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PLAIN = {"export", "du", "sbatch"}


def parse_make(words: tuple[str, ...]) -> None:
    assert set(words) <= TARGETS


def parse_python(words: tuple[str, ...]) -> None:
    if words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file()
        return
    assert words[0] == "-m"
    assert importlib.util.find_spec(words[1]) is not None
    if words[1] == "prelar":
        build_parser().parse_args(list(words[2:]))


def parse_dvc(words: tuple[str, ...]) -> None:
    given = parse_args(list(words))
    settings = getattr(given, "set_param", None) or []
    for setting in settings:
        key, _, value = setting.partition("=")
        assert key in keys(), f"{key}: no such key"
        several = getattr(given, "queue", False) and not value.startswith("[")
        for choice in value.split(",") if several else [value]:
            params = read_yaml(ROOT / "params.yaml")
            tree: dict[str, object] = {}
            *groups, name = key.split(".")
            node = tree
            for group in groups:
                node = node.setdefault(group, {})  # type: ignore[assignment]
            node[name] = YAML(typ="safe", pure=True).load(choice)
            merge(params, {k: v for k, v in tree.items() if k != "demos"})
            Config.model_validate(params)
    for target in getattr(given, "targets", None) or []:
        assert target in read_yaml(ROOT / "dvc.yaml")["stages"]


PARSERS: dict[str, Callable[[tuple[str, ...]], None]] = {
    "make": parse_make,
    "python": parse_python,
    "dvc": parse_dvc,
}


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in blocks()} <= LANGUAGES
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_parses(command: Command) -> None:
    program, *words = command.words
    assert program in PARSERS or program in PLAIN, f"{program}: no parser for it"
    if program in PARSERS:
        PARSERS[program](tuple(words))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.reason], ids=str)
def test_a_command_is_not_run_for_a_reason(command: Command) -> None:
    assert command.reason and len(command.reason) > 8


def test_params_of_the_docs_are_valid_and_stages_are_what_a_mixture_needs() -> None:
    """Each block of YAML with keys of params.yaml, on top of those before it on its page."""
    params, stages = read_yaml(ROOT / "params.yaml"), []
    for block in (block for block in blocks() if block.language == "yaml"):
        values = parse_yaml(block.text.replace("…", "0"))
        if values.keys() <= Config.model_fields.keys():
            params |= values
            Config.model_validate(params)
        else:
            stages.append(values)
    (stage,) = stages
    assert stage == parse_yaml(MEMBER.format(name="robots"))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: params_page.Path) -> None:
    text = page.read_text(encoding="utf-8")
    for address in re.findall(r"\]\(([^)\s]+)\)", text):
        if address.startswith(("https://", "http://")):
            continue
        place, _, anchor = address.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), address
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), address


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_exist(page: params_page.Path) -> None:
    named = re.findall(r"`((?:prelar|flows|tests|tools)/[\w/.]+)`", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_hooks_of_pre_commit_are_the_linters_of_make() -> None:
    recipe = re.search(
        r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert recipe
    linters = re.findall(r"^\t@(ruff \w+|[\w-]+)", recipe[1], re.MULTILINE)
    (repo,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in repo["hooks"]]
    assert len(entries) == len(linters)
    assert all(entry.startswith(linter) for entry, linter in zip(entries, linters, strict=True))


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme] == []


def test_the_reference_of_params_is_current() -> None:
    told = "run `make params` and commit docs/params.md"
    assert params_page.page() == params_page.PAGE.read_text(encoding="utf-8"), told


def test_the_reference_of_params_names_types_bounds_and_descriptions() -> None:
    text = params_page.page()
    assert "| `demos.variations` | integer ≥ 1, ≤ 1,000,000,000 or null | `1` |" in text
    assert "| `ssv2.max_bad` | number ≥ 0, ≤ 1 | `0.01` | share of bad clips" in text
    assert (
        "| `lam` | number ≥ 0, ≤ 1 | `0.95` | `0.95` | `0.95` | `0.95` | lambda of the lambda-returns" in text
    )
    listed = [key for key in keys() if not key.startswith(("scales.small", "scales.lite", "scales.paper"))]
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) == len(listed)
