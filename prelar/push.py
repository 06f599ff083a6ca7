"""`python -m prelar push`: hand a checkpoint on through the Hugging Face Hub, with a card.

What goes there: the weights as safetensors, config.json, and README.md, which is written from the run's
params and metrics, each beside its control. No pickle, no store and no frames of the data go there; pictures
do where the project drew them itself, or where it is asked for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prelar.report.catalog import EVALUATE, METHODS
from prelar.report.provenance import redact
from prelar.report.runs import Run, read_workspace
from prelar.train.checkpoint import load_parts
from prelar.utils.errors import UserError, extras_named, printable
from prelar.utils.hub import NAME, hub_errors

CHECKPOINTS = (Path("data/finetune"), Path("data/pretrain"))
PICTURES = {
    "open_loop_poster.png": "Open-loop prediction: true frames, imagined ones, and their difference",
    "action_swap.png": "One start under the latent actions of other clips",
}
DRAWN_HERE = (
    {"dataset": "ssv2", "ssv2.source": "data/sample"},
    {"dataset": "demos", "demos.source": "metaworld"},
)
"""Params of which every frame was rendered by the project."""


def run(name: str, folder: Path, *, private: bool, pictures: bool) -> None:
    """Upload a checkpoint to the repository `name`, which is made where there is none.

    Raises `UserError` for another name, a folder that holds no checkpoint, a run that is not at its end, a
    missing token, and what the hub refuses.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{printable(name, 200)}: not a repository name; give org/name")
    parts, described = load_parts(folder)  # all of it is read, as who loads it will
    done = read_run(folder, described)
    shown = {}
    if done is not None and (pictures or any(own.items() <= done.params.items() for own in DRAWN_HERE)):
        shown = {picture: EVALUATE / picture for picture in PICTURES if (EVALUATE / picture).is_file()}
    with extras_named():
        from huggingface_hub import CommitOperationAdd, HfApi, get_token
    if get_token() is None:
        raise UserError(f"{name}: no token to upload with; run `hf auth login`, or set HF_TOKEN")
    files: dict[str, Path | bytes] = {f"{part}.safetensors": folder / f"{part}.safetensors" for part in parts}
    files |= {"config.json": folder / "config.json", **shown}
    files["README.md"] = card(name, described, done, sorted(shown)).encode()
    with hub_errors(name):
        hub = HfApi(library_name="prelar")
        hub.create_repo(name, private=private, exist_ok=True)
        commit = hub.create_commit(
            name,
            operations=[CommitOperationAdd(path, content) for path, content in sorted(files.items())],
            commit_message=f"Upload {folder.name}, made by prelar",
        )
    print(f"push: {folder} -> {name}, {len(files)} files, revision {commit.oid}", flush=True)


def read_run(folder: Path, described: Mapping[str, Any]) -> Run | None:
    """The run that a checkpoint is of; None for one that lies elsewhere, of which nothing else is known."""
    if folder.absolute() not in [own.absolute() for own in CHECKPOINTS]:
        return None
    found = read_workspace()
    stale = sorted({"pretrain", "finetune", "evaluate"} & set(found.stale))
    if stale or found.params.get("method") != described.get("model", {}).get("method"):
        raise UserError(f"{folder}: made with other params than params.yaml has now; run `dvc repro` first")
    return found


def card(name: str, described: Mapping[str, Any], done: Run | None, pictures: Sequence[str]) -> str:
    """The text of README.md."""
    spec, stage = described.get("model", {}), described.get("stage")
    title, about = METHODS[spec["method"]]
    what = (
        f"fine-tuned on {described.get('task', 'a task')}" if stage == "finetune" else "pre-trained on video"
    )
    tags = f"[world-model, model-based-rl, {spec['method']}]"
    lines = [
        f"---\nlibrary_name: prelar\npipeline_tag: robotics\ntags: {tags}\n---",
        f"# A world model, {title}, {what}",
        about,
        "## Use",
        f'```python\nimport prelar\n\nmodel = prelar.load("{name}")  # revision="…" pins a commit\n```',
        "It takes frames uint8 (T, 64, 64, 3). The weights are safetensors; nothing in the files is run.",
        "## What it is worth",
        *(evaluation(done) if done else ["No evaluation was handed on with it."]),
        *(f"![{PICTURES[picture]}]({picture})" for picture in pictures),
        "## How it was made",
        *(provenance(done) if done else ["config.json tells its sizes."]),
    ]
    return "\n\n".join(lines) + "\n"


def evaluation(done: Run) -> list[str]:
    """The figures, each beside what does without the model."""
    summary = done.files.load(EVALUATE / "summary.json") or {}
    rows = []
    for policy in summary.get("episodes", {}).get("policies", []):
        spread = f"{policy['low']:.4g} to {policy['high']:.4g}"
        rows.append((f"return, {policy['name']}", f"{policy['return']:.4g}", f"95% interval {spread}"))
    metrics = done.metrics
    for key, label in (
        ("success_rate", "success rate of the agent"),
        ("prediction_error", "open-loop error, held-out clips"),
        ("prediction_error_policy", "open-loop error, the agent's episodes"),
        ("controllability_db", "controllability, dB"),
    ):
        if key in metrics:
            control = (
                f"copying the last frame: {metrics[f'{key}_copy']:.4g}" if f"{key}_copy" in metrics else ""
            )
            if f"{key}_low" in metrics:
                control = (
                    f"lower end of its 95% interval: {metrics[f'{key}_low']:.4g}; 0: actions decide nothing"
                )
            rows.append((label, f"{metrics[key]:.4g}", control))
    for row in (done.files.load(EVALUATE / "probe.json") or {}).get("rows", []):
        rows.append((f"probe of the action, R², {row['name']}", f"{row['mean']:.3f}", ""))
    return [
        "\n".join(
            ["| figure | value | beside |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
        )
    ]


def provenance(done: Run) -> list[str]:
    """The commit, what was changed in params.yaml, and the commands that make it again."""
    names = ("method", "dataset", "task", "scale", "seed", "frame_gap")
    settings = {key: done.params[key] for key in (*names, *done.changed) if key in done.params}
    table = [
        f"| `{key}` | `{printable(json.dumps(redact(value)), 120)}` |" for key, value in settings.items()
    ]
    told = ["\n".join(["| param | value |", "|---|---|", *table])]
    if done.unrepeated:
        told.append(f"The code differed from that commit in {len(done.unrepeated)} files.")
    if done.commands:
        told.append("\n".join(["```bash", *done.commands, "```"]))
    return told
