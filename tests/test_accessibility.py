"""The pages in a browser: axe finds no obstacle, and nothing is wider than the window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser

from prelar.config import load_config
from prelar.report import compare as comparison
from prelar.report import page as report
from prelar.report.runs import workspace_files
from prelar.utils.files import write_text
from tests.browser import empty_page, launched, obstacles, picture
from tests.conftest import ROOT
from tests.fake_results import make_results
from tests.report.run_files import make_run

UPDATES = (10.0, 20.0, 30.0)
SCRIPT = "document.body.append(Object.assign(document.createElement('script'), {text: 'open()'}))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The page of one run, and one that compares settings, of one seed and of two."""
    folder = tmp_path_factory.mktemp("pages")
    make_results(folder)
    report.run(load_config(ROOT / "params.yaml"), folder)
    runs = []
    for number, (beta_a, seed) in enumerate(((1.0, 0), (0.1, 0), (0.1, 1))):
        run = make_run(f"run-{number}", [0.1, 0.2 * beta_a, 0.3 + 0.1 * seed], beta_a=beta_a, seed=seed)
        curves = {
            "pretrain_kl": (UPDATES, (90.0 + seed, 9.0, beta_a)),
            "offline_pretrained_error": (UPDATES, (0.5, 0.1 + 0.01 * seed, 0.05)),
            "offline_scratch_error": (UPDATES, (0.6, 0.3, 0.1 * beta_a)),
        }
        runs.append(replace(run, curves={**run.curves, **curves}, files=workspace_files(folder)))
    compared = folder / "reports/compare.html"
    write_text(compared, comparison.render(runs))
    return [folder / report.PAGE, compared]


@pytest.mark.parametrize(
    ("scheme", "width"), [pytest.param("light", 390, marks=pytest.mark.long), ("dark", 1280)]
)
def test_the_pages_are_open_to_everybody(
    browser: Browser, pages: list[Path], scheme: Literal["light", "dark"], width: int
) -> None:
    with empty_page(browser) as (page, hosts):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        told: list[str] = []
        page.on("console", lambda message: told.append(message.text))
        for path in pages:
            page.goto(path.as_uri())
            picture(page, f"{path.stem}-{scheme}-{width}", whole=True)
            assert obstacles(page) == ""
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            assert not [text for text in told if "Content Security Policy" in text]
            page.evaluate(SCRIPT)
            assert [text for text in told if "Content Security Policy" in text], "it runs no script"
            told.clear()
        assert hosts == {""}
