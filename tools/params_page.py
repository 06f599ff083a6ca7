"""Write docs/params.md: every key of params.yaml with its type, bounds, value and description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prelar.config import Config, load_config
from prelar.report.provenance import flatten
from prelar.utils.files import write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/params.md"
HEAD = """# Parameters

Written by `make params` from `prelar/config.py` and `params.yaml`; a test keeps them consistent. Values are
those of `params.yaml`, which `dvc exp run -S key=value` changes for one experiment.
"""
SCALES = ("smoke", "small", "lite", "paper")
GROUPS = {
    "": "Ablations and machine",
    "sample": "The rendered sample",
    "ssv2": "Something-Something V2",
    "demos": "Demonstrations",
}


def page(root: Path = ROOT) -> str:
    """The page's text."""
    values = flatten(load_config(root / "params.yaml").model_dump(mode="json"))
    fields = describe(Config.model_json_schema())
    parts = [HEAD]
    for group in dict.fromkeys(key.rpartition(".")[0] for key in values if not key.startswith("scales.")):
        parts.append(f"## {GROUPS.get(group, group)}\n\n| key | type | value | |\n|---|---|---|---|")
        parts += [
            f"| `{key}` | {fields[key][0]} | {shown(value)} | {fields[key][1]} |"
            for key, value in values.items()
            if key.rpartition(".")[0] == group and not key.startswith("scales.")
        ]
        parts.append("")
    stages = dict.fromkeys(key.split(".")[2] for key in values if key.startswith("scales."))
    for stage in stages:
        prefix = f"scales.{SCALES[0]}.{stage}."
        names = [key.removeprefix(prefix) for key in values if key.startswith(prefix)]
        parts.append(f"## Presets of {stage}: `scales.<scale>.{stage}`\n")
        parts.append(f"| key | type | {' | '.join(SCALES)} | |\n|---|---|---|{'---|' * len(SCALES)}")
        for name in names:
            cells = " | ".join(shown(values[f"scales.{scale}.{stage}.{name}"]) for scale in SCALES)
            kind, description = fields[prefix + name]
            parts.append(f"| `{name}` | {kind} | {cells} | {description} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def shown(value: Any) -> str:
    """A value as it stands in a table."""
    text = json.dumps(value) if not isinstance(value, str) else value
    return f"`{text}`"


def describe(schema: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Dotted key → type and bounds in words, and description, of a JSON schema; `|` would end a cell."""
    found: dict[str, tuple[str, str]] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, field in node["properties"].items():
            target = resolve(field, schema)
            if "properties" in target:
                walk(target, f"{prefix}{name}.")
            else:
                described = field["description"].replace("|", "·")
                found[prefix + name] = words(target, schema), described

    walk(schema, "")
    return found


def resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A node, or the one that it refers to."""
    if "$ref" in node:
        target: dict[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
        return target
    return node


def words(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """A type in words."""
    if "anyOf" in node:
        return " or ".join(words(resolve(option, schema), schema) for option in node["anyOf"])
    if "enum" in node:
        return "one of " + ", ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    kind = str(node.get("type"))
    if kind == "array":
        return f"list of {words(node['items'], schema)}"
    name = {"string": "text", "boolean": "true or false"}.get(kind, kind)
    signs = {"exclusiveMinimum": "> ", "minimum": "≥ ", "maximum": "≤ ", "multipleOf": "a multiple of "}
    given = [(sign, node[key]) for key, sign in signs.items() if key in node]
    bounds = [f"{sign}{int(bound):,}" if bound == int(bound) else f"{sign}{bound:g}" for sign, bound in given]
    return f"{name} {', '.join(bounds)}" if bounds else name


if __name__ == "__main__":
    write_text(PAGE, page())
