"""Write prelar/report/published_curves.csv from the raw curves that authors published: `FOLDER` holds those.

Points of each task, and of all tasks of a source: interquartile mean, its 95% interval from a stratified
bootstrap over seeds, mean, and the number of runs.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from prelar.report.published import FILE
from prelar.report.statistics import estimate

SOURCES = {  # file → suite, source, and the names that its methods have here
    "apv_metaworld_curves.csv": ("metaworld", "apv", {"APV": "APV on RLBench"}),
    "apv_dmc_curves.csv": (
        "dmc",
        "apv",
        {"APV (Locomotion)": "APV on locomotion", "APV (Manipulation)": "APV on manipulation"},
    ),
    "dreamerv2_dmc_curves.csv": ("dmc", "dreamerv2", {"DreamerV2": "DreamerV2, its authors’ runs"}),
}


def main(folder: Path) -> None:
    """Read the raw curves and write the table."""
    rows: list[tuple[object, ...]] = []
    for name, (suite, source, called) in SOURCES.items():
        runs: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
        with (folder / name).open(encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                if row["task"].startswith("stats_"):
                    continue
                value = float(row.get("return") or row.get("success_rate") or 0)
                task = runs.setdefault(called.get(row["method"], row["method"]), {}).setdefault(
                    row["task"], {}
                )
                task.setdefault(row["seed"], {})[int(row["env_steps"])] = value
        for method, tasks in sorted(runs.items()):
            seeds = [seed for task in tasks.values() for seed in task.values()]
            steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
            scores = {
                name.replace("_", "-"): np.array([[seed[step] for step in steps] for seed in task.values()])
                for name, task in sorted(tasks.items())
            }
            for task_name, chosen in [
                *((key, [value]) for key, value in scores.items()),
                ("all", [*scores.values()]),
            ]:
                for step, e in zip(steps, estimate(chosen), strict=True):
                    figures = (f"{x:.4g}" for x in (e.iqm, e.low or 0.0, e.high or 0.0, e.mean))
                    rows.append((suite, source, method, task_name, step, *figures, e.n))
    with FILE.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("suite", "source", "method", "task", "step", "iqm", "low", "high", "mean", "runs"))
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
