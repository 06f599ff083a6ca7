"""The virtual simulator: a page, reports/simulator.html, in which a person drives what the model imagines."""

from __future__ import annotations

from prelar.config import Config


def run(config: Config) -> None:
    """Write the page; see `prelar.simulator.page.run`."""
    from prelar.simulator import page

    page.run(config)
