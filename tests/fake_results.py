"""What the stages leave behind for the report, made up: small, complete, a function of nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from prelar.evaluation.panels import grid, write_png
from prelar.utils.files import write_text
from prelar.utils.tables import write_tsv
from prelar.utils.video_file import enlarge, side_by_side, write_mp4

METRICS = {
    "success_rate": 1 / 3,
    "return": 412.25,
    "return_low": 300.5,
    "return_random_high": 68.5,
    "prediction_error": 0.00412,
    "prediction_error_copy": 0.0061,
    "prediction_error_policy": 0.0021,
    "prediction_error_policy_copy": 0.0019,
    "prediction_error_late": 0.0051,
    "prediction_error_late_copy": 0.0079,
    "prediction_error_late_median": 0.0043,
    "controllability_db": 1.25,
    "controllability_db_low": 0.75,
}


def moving(length: int = 12, height: int = 64, width: int = 64) -> np.ndarray:
    """A square that crosses a sloping background, uint8 (length, height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    ground = np.stack([60 + x, 90 + y, 140 - y // 2], -1).astype(np.uint8)
    frames = np.repeat(ground[None], length, 0)
    for t in range(length):
        frames[t, 20:34, 4 * t : 4 * t + 14] = (220, 180, 60)
    return frames


def make_results(root: Path, *, pretrained: bool = True) -> None:
    """Write metrics.json and the folders under reports/ that the page is made from."""
    metrics = {k: v for k, v in METRICS.items() if pretrained or "policy" in k or "prediction" not in k}
    headline = {name: value for name, value in metrics.items() if not name.endswith("_copy")}
    (root / "metrics.json").write_text(json.dumps(headline), encoding="utf-8")
    write_text(root / "reports/evaluate/metrics.json", json.dumps(metrics))
    curves = root / "reports/finetune/plots/metrics"
    steps = list(range(0, 1501, 250))
    write_tsv(curves / "eval/success.tsv", {"step": steps, "success": [0, 0, 0.2, 0.2, 0.6, 0.8, 0.8]})
    write_tsv(curves / "eval/return.tsv", {"step": steps, "return": [80 + 60.5 * i for i in range(7)]})
    if pretrained:
        losses = root / "reports/pretrain/plots/metrics/loss"
        updates = list(range(10, 2010, 10))
        for name, size in (("image", 900.0), ("kl", 14.0), ("action_kl", 3.0), ("consistency", 0.7)):
            values = [size * (0.02 + math.exp(-step / 300)) for step in updates]
            write_tsv(losses / f"{name}.tsv", {"step": updates, name: values})
    make_evaluation(root / "reports/evaluate", pretrained=pretrained)
    make_checks(root / "data/ssv2.json")


def make_checks(path: Path) -> None:
    """Write what the validation of a store found."""
    checks = [
        {"says": "at most 1.00% of the clips are bad", "success": True, "detail": ""},
        {"says": "no frame is black", "success": False, "detail": "3 <b>"},
    ]
    suite = {"name": "clips", "about": "The clips in the store", "rows": 77, "checks": checks}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": "ssv2", "suites": [suite]}), encoding="utf-8")


def make_probe(folder: Path) -> None:
    """Write the probe's table and the action swap."""
    names = ("latent action, pre-trained", "untrained encoder", "raw frame difference", "shuffled pairs")
    rows = [
        {"name": name, "r2": [0.5 - 0.1 * k, 0.4, 0.25, -0.0123], "mean": 0.3 - 0.05 * k}
        for k, name in enumerate((*names, "encoder trained with labels"))
    ]
    head = {"dimensions": ["x", "y", "z", "gripper"], "train": 300, "test": 150}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("probe", "probe_demonstrations"):
        (folder / f"{name}.json").write_text(json.dumps(head | {"rows": rows, "gap": 4}), encoding="utf-8")
        gaps = {"step": [1, 2, 4, 8], "latent": [0.2, 0.3, 0.5, 0.55], "untrained": [-0.1, 0.1, 0.2, 0.2]}
        write_tsv(folder / f"{name}_gaps.tsv", gaps | {"difference": [0.1, 0.2, 0.3, 0.35]})
    write_png(folder / "action_swap.png", grid(np.stack([moving(7)] * 6)))


def make_offline(folder: Path, start: str, factor: float) -> None:
    """Write the errors of the world model that was fitted to fixed episodes from one start."""
    updates = list(range(0, 21, 2))
    table: dict[str, list[float]] = {"step": [float(update) for update in updates]}
    for name, size in (("error", 0.08), ("reward_error", 4.0)):
        for suffix, share in (("", 1.0), ("_min", 0.9), ("_max", 1.2)):
            table[name + suffix] = [factor * share * size * math.exp(-update / 8) for update in updates]
    write_tsv(folder / f"offline_{start}.tsv", table)


def make_evaluation(folder: Path, *, pretrained: bool = True) -> None:
    """Write reports/evaluate."""
    ahead = list(range(1, 12))
    error = {"step": ahead, "model": [0.002 + 0.0004 * k for k in ahead], "copy": [0.001 * k for k in ahead]}
    error["median"] = [0.004] * len(ahead)
    for kind in ("model", "copy", "median"):
        error[f"{kind}_psnr"] = [-10 * math.log10(value) for value in error[kind]]
    write_tsv(
        folder / "episodes.tsv",
        {"episode": [0, 1, 2], "steps": [250] * 3, "return": [300.5, 310, 626.25], "success": [0, 0, 1]},
    )
    segments = {"clips": 8, "observed": 5, "length": 16}
    decided = {"mean": 1.25, "low": 0.75, "high": 1.5, "clips": 24, "pairs": 264}
    decided |= {"changed": 0.011, "changed_swapped": 0.017}
    summary = {
        "episodes": {
            "count": 3,
            "successes": 1,
            "time_limit": 250,
            "return_min": 300.5,
            "return_max": 626.25,
            "random": {"success": 0, "return": 61.5},
            "policies": [
                {"name": name, "episodes": count, "return": mean, "low": low, "high": high, "success": 0.0}
                for name, count, mean, low, high in (
                    ("agent", 3, 412.25, 300.5, 626.25),
                    ("random actions", 50, 61.5, 55.25, 68.5),
                    ("scripted expert", 3, 1020.0, 1001.5, 1040.25),
                )
            ],
        },
        "policy": {"shown": 3},
        "prediction_policy": segments,
        "controllability_policy": decided,
        "offline": {
            "seeds": 2,
            "learnt": 4,
            "held_out": 2,
            "steps": 100,
            "observed": 5,
            "ahead": 11,
            "copy_error": 0.0031,
            "mean_reward_error": 2.5,
        },
    }
    make_offline(folder, "scratch", 1.0)
    names = ["prediction_policy"]
    if pretrained:
        summary["prediction"] = {**segments, "split": "validation", "latent": True}
        summary |= {"controllability": decided, "controllability_untrained": {**decided, "mean": 0.01}}
        errors = {"weight": 0.5, "prediction_error": 0.004, "prediction_error_copy": 0.006}
        summary["sources"] = [{"source": "ssv2", **errors}, {"source": "<it>", **errors, "probe_r2": 0.4}]
        names.append("prediction")
        make_probe(folder)
        make_offline(folder, "pretrained", 0.5)
    else:
        summary["prediction_missing"] = "DreamerV2 has no pre-trained model."
    for name in names:
        write_tsv(folder / f"{name}.tsv", error)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    dataset = {
        "frames": 3120,
        "clips": 77,
        "pairs": 3043,
        "labels": 6,
        "splits": {"train": 65, "validation": 12},
        "bad": 3,
        "shortest": 8,
        "longest": 80,
        "median": 41.0,
        "sheet": 32,
        "previews": [
            {"label": "Pushing [it]", "file": "00.png", "clips": 40, "rows": ["17", "41"]},
            {"label": "Opening <it>", "file": "01.png", "clips": 1, "rows": ["corner"]},
        ],
        "reasons": [{"reason": "not a video <script>", "count": 3, "examples": ["17", "41", "66"]}],
        "attributes": {"source": "ssv2", "resize": "64x64 bicubic"},
    }
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    clip = moving()
    write_png(folder / "action_directions.png", grid(np.stack([moving(7)] * 4)))
    for name in ("policy", "open_loop", "open_loop_policy"):
        pair = np.stack([clip] * 3)
        frames = side_by_side(pair, np.roll(pair, 1, axis=1), observed=5, factor=2)
        if name == "policy":
            frames = enlarge(np.concatenate([clip] * 3, axis=2), 2)
        write_mp4(folder / f"{name}.mp4", frames, 10)
        Image.fromarray(frames[6]).save(folder / f"{name}_poster.png")
    Image.fromarray(np.concatenate([np.concatenate(clip[::2], axis=1)] * 3)).save(folder / "open_loop.png")
    Image.fromarray(np.concatenate([np.concatenate(clip[:8], axis=1)] * 4)).save(folder / "contact_sheet.png")
    (folder / "previews").mkdir()
    for preview in dataset["previews"]:
        row = np.concatenate(clip[:8], axis=1)
        Image.fromarray(np.concatenate([row] * len(preview["rows"]))).save(
            folder / "previews" / preview["file"]
        )
