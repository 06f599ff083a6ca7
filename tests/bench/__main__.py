"""`make bench`: run every bench of this folder and write one table, reports/bench.json.

A bench is a module `bench_<name>.py` whose `run()` returns figures by name. A ratio stands for the median of
paired readings taken in turn within this run; readings vary by a tenth, so the benches print their spread.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from prelar.utils.errors import run_main
from prelar.utils.files import write_text

HERE = Path(__file__).parent


def main() -> None:
    """Run the benches named on the command line, or all."""
    names = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benches to run: {', '.join(names)}")
    chosen = parser.parse_args().names or names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"no bench is called {', '.join(unknown)}; there are {', '.join(names)}")
    path = Path("reports/bench.json")
    figures: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in chosen:
        print(f"--- {name}", flush=True)
        figures |= importlib.import_module(f"tests.bench.bench_{name}").run()
        write_text(path, json.dumps(figures, indent=2, sort_keys=True) + "\n")
    width = max(map(len, figures), default=0)
    for key in sorted(figures):
        print(f"{key:<{width}}  {figures[key]:12,.3f}")


if __name__ == "__main__":
    run_main(main)
