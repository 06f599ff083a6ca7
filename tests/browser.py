"""A headless Chromium of the distribution's, and where its screenshots go."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from tests.conftest import ROOT
from tests.serving import split

NAMES = ("chromium", "chromium-browser", "google-chrome")
PICTURES = ROOT / "tests/output/ui"
PATIENCE_MS = 120_000


@contextlib.contextmanager
def launched(*options: str) -> Iterator[Browser]:
    """A browser with these options. Within, this thread can run no asyncio of its own."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(
            f"none of {', '.join(NAMES)} found; install one: sudo apt-get install chromium", pytrace=False
        )
    words = ["--no-sandbox", *options]
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=found, args=words) as browser,
    ):
        yield browser


@contextlib.contextmanager
def empty_page(browser: Browser) -> Iterator[tuple[Page, set[str]]]:
    """A page that shares nothing with others, and the hosts that it asked for anything so far."""
    with browser.new_context(viewport={"width": 1280, "height": 1400}) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        hosts: set[str] = set()
        page.on(
            "request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None
        )
        try:
            yield page, hosts
        finally:
            picture(page, "last")


@contextlib.contextmanager
def browser_page() -> Iterator[tuple[Page, set[str]]]:
    """`empty_page` of a browser of its own."""
    with launched() as browser, empty_page(browser) as page:
        yield page


def picture(page: Page, name: str, *, whole: bool = False) -> None:
    """Keep a screenshot of what is seen, or of the whole page, among the tests' output."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=Path(PICTURES, f"{name}.png"), full_page=whole)


def sign_in(page: Page, api: str) -> str:
    """Open the UI by its link, given its API with the string; returns the UI's address."""
    url, auth = split(api)
    ui = url.removesuffix("/api")
    page.goto(f"{ui}/signin#{auth}")
    page.wait_for_url("**/dashboard**")
    return ui


def run_from_form(page: Page, ui: str, deployment: str, run: str, changes: dict[str, str]) -> None:
    """Fill a deployment's form in the Prefect UI, submit it, and go to the page of the run."""
    page.goto(f"{ui}/deployments")
    page.get_by_role("link", name=deployment, exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.get_by_text("Custom run").first.click()
    for label, value in {
        "Run Name": run,
        **{f"{key} (Optional)": text for key, text in changes.items()},
    }.items():
        page.locator(f"xpath=//label[normalize-space()='{label}']/following::input[1]").fill(value)
    picture(page, f"{run}-form")
    page.get_by_role("button", name="Submit", exact=True).last.click()
    page.get_by_role("link", name=run, exact=True).first.click()
    page.wait_for_url("**/runs/flow-run/**")


def read_artifact(page: Page, key: str) -> tuple[str, dict[str, str]]:
    """The text of the artifact page of a run, whose own page is open, and its links by their texts."""
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_role("link").filter(has_text=key).last.click()
    page.locator("table").last.wait_for()
    picture(page, f"artifact-{key}")
    links = {link.inner_text(): str(link.get_attribute("href")) for link in page.get_by_role("link").all()}
    return page.locator("body").inner_text(), links


def obstacles(page: Page) -> str:
    """What axe finds that keeps somebody from reading a page, folds opened; empty where all is well."""
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true })")
    return str(Axe().run(page).generate_report()).removeprefix("Found 0 accessibility violations:\n")
