"""The data: what is in the store, what was left out of it, and how it was made."""

from __future__ import annotations

from pathlib import Path

from prelar.report.results import PAGE, Results, Section, data_uri, read_json

VALIDATION = Path("reports/validation")


def section(results: Results) -> Section:
    """The section on the store of this run."""
    documents = VALIDATION / results.config.dataset / "index.html"
    dataset = read_json(results.folder / "dataset.json")
    values = {
        "dataset": dataset,
        "previews": [
            {**preview, "source": data_uri(results.folder / "previews" / preview["file"])}
            for preview in (dataset or {}).get("previews", [])
        ],
        "validation": read_json(results.root / results.config.store.with_suffix(".json")),
        "documents": documents.relative_to(PAGE.parent).as_posix(),
    }
    return Section("data", "Data", values)
