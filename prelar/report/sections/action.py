"""The latent action: the probe and the swap."""

from __future__ import annotations

from prelar.report.results import Results, Section, read_json


def section(results: Results) -> Section:
    """The section on what the latent action means."""
    return Section("action", "Latent action", {"probe": read_json(results.folder / "probe.json")})
