"""The simulator's page in a browser: steps of imagination a second, at the sizes of scales smoke and lite."""

from __future__ import annotations

import tempfile
from pathlib import Path

from prelar.config import load_config
from prelar.simulator import runtime
from prelar.simulator.page import render
from tests.browser import browser_page
from tests.simulator.small import make_entry

STEPS = 200
TIMED = """async count => {
  const record = Array(simulator.world.action_dim).fill(0), began = performance.now();
  for (let i = 0; i < count; i++) { await advance(record); }
  return count / (performance.now() - began) * 1000;
}"""


def run() -> dict[str, float]:
    """`simulator_smoke_fps` and `simulator_lite_fps`: untrained models, drawn to the screen; aim: 20."""
    return {f"simulator_{scale}_fps": reading(scale) for scale in ("smoke", "lite")}


def reading(scale: str) -> float:
    """Steps a second at a scale."""
    presets = getattr(load_config(Path("params.yaml")).scales, scale)
    names = ("cnn_depth", "decoder_channels", "hidden", "deter", "stoch", "discrete", "action_dim")
    sizes = {name: getattr(presets.pretrain, name) for name in names}
    sizes |= {"units": presets.finetune.units, "layers": presets.finetune.layers}
    with tempfile.TemporaryDirectory() as place:
        entry, path = make_entry(Path(place) / "it", "prelar", "finetune", **sizes), Path(place) / "it.html"
        path.write_text(render([entry], runtime.find()), encoding="utf-8")
        with browser_page() as (page, _):
            page.goto(path.as_uri())
            page.locator("#stage:visible").wait_for()
            page.evaluate(TIMED, 20)
            found = float(page.evaluate(TIMED, STEPS))
        print(f"{scale}: {found:.1f} steps a second, page of {path.stat().st_size / 1e6:.1f} MB", flush=True)
    return found
