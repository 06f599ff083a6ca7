"""The latent action: the probe and the swap."""

from __future__ import annotations

from prelar.report.results import Results, Section, read_json


def section(results: Results) -> Section:
    """The section on what the latent action means: in episodes of random actions, and in recorded ones."""
    probes = {name: read_json(results.folder / f"{name}.json") for name in ("probe", "probe_demonstrations")}
    return Section("action", "Latent action", {"probes": probes})
