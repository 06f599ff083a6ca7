"""The origin: commit, inputs, parameters, and the commands that make the numbers again."""

from __future__ import annotations

import json

from prelar.config import Config
from prelar.report.privacy import presentable
from prelar.report.provenance import find_provenance, flatten
from prelar.report.results import Results, Section

STAGES = ("pretrain", "finetune", "evaluate")


def section(results: Results) -> Section:
    """The section on where the run comes from."""
    values = {
        "provenance": find_provenance(results.config, results.root),
        "params": params_groups(results.config),
    }
    return Section("origin", "Origin", values)


def params_groups(config: Config) -> dict[str, dict[str, str]]:
    """The parameters that this run used, as text: for ablations, for the data, and the chosen presets.

    What is private in them is left out.
    """
    flat = {key: presentable(value) for key, value in flatten(config.model_dump(mode="json")).items()}
    groups: dict[str, dict[str, str]] = {"Ablation": {}, "Data": {}}
    groups.update({f"scales.{config.scale}.{stage}": {} for stage in STAGES})
    for key, value in flat.items():
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
        if "." not in key:
            groups["Ablation"][key] = text
        elif key.startswith((f"{config.dataset}.", "sample.")):
            groups["Data"][key] = text
        elif key.startswith(f"scales.{config.scale}."):
            group, _, name = key.rpartition(".")
            groups[group][name] = text
    return groups
