"""The page of the simulator: one file with the models, what they start from, and what runs them.

It needs no network and no server. Where the runtime could not be had, or a model is too large for a page, the
page says so and names the command. Every text in it is data: scripts run by their hashes only.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import nn

from prelar.config import Config
from prelar.simulator import runtime
from prelar.simulator.step import Step, export, export_look, load_step
from prelar.simulator.world import World, clips_world, episodes_world
from prelar.store.store import Store
from prelar.train.checkpoint import load_config
from prelar.train.loop import set_up
from prelar.utils.files import write_text
from prelar.utils.processes import worker_pool
from prelar.utils.tables import read_tsv

PAGE = Path("reports/simulator.html")
TEMPLATES = Path(__file__).parent / "templates"
STYLE = TEMPLATES.parents[1] / "report/templates"
CHECKPOINTS = Path("data/finetune"), Path("data/pretrain")
EVALUATE = Path("reports/evaluate")
ERRORS = {"finetune": "prediction_policy.tsv", "pretrain": "prediction.tsv"}
EXPORTERS = ("onnx", "onnxscript")
LARGEST = 25 << 20
"""Bytes of a model that a page may hold; a larger one is played through a server."""
METHODS = {"dreamerv2": "DreamerV2", "apv": "APV", "contextwm": "ContextWM", "prelar": "PreLAR"}


@dataclass(frozen=True)
class Entry:
    """A model of the page.

    title, notes: what it is, in words and in sentences. world: what it starts from, None where it cannot be
    played. graph, look: ONNX graphs of its step and of what it takes a picture for, None where a server runs
    them; `look` also where it does not fit into the page. mark: a digest of its weights.
    """

    title: str
    notes: Sequence[str]
    world: World | None = None
    graph: bytes | None = None
    look: bytes | None = None
    mark: str = ""


def run(config: Config, root: Path = Path()) -> None:
    """Write reports/simulator.html under `root` from the checkpoints, the store and the evaluation there.

    Raises `UserError` where a checkpoint or the store is missing.
    """
    folders = [folder for folder in CHECKPOINTS if "dynamics" in load_config(folder)["parts"]]
    with worker_pool(len(folders)) as pool:  # turning a model into a graph takes longest
        found = list(pool.map(functools.partial(entry_of, config, root), folders))
    write_text(root / PAGE, render(found, runtime.find()))
    size = (root / PAGE).stat().st_size / 1e6
    print(f"simulator: {root / PAGE}, {size:.1f} MB", flush=True)


def entry_of(config: Config, root: Path, folder: Path) -> Entry:
    """`make_entry` for a checkpoint of a project, in a process of its own."""
    set_up(device="cpu", precision="fp32", threads=config.threads)
    return make_entry(folder, functools.partial(find_world, config), root)


def find_world(config: Config, step: Step) -> World | None:
    """What a model starts from in a project: episodes of its agent, else held-out clips; None without any."""
    if step.actor is None:
        return clips_world(step, Store.open(config.store), config.evaluate.length)
    return episodes_world(step, config)


def make_entry(folder: Path, start: Callable[[Step], World | None], root: Path) -> Entry:
    """What the page shows of a checkpoint."""
    step = load_step(folder)
    size = weight_bytes(step_modules(step))
    title, notes = describe(step, root)
    remedy = f"To play it: python -m prelar play {folder}"
    if size > LARGEST:
        return Entry(title, [*notes, f"The model is too large for a page. {remedy}"])
    if not all(importlib.util.find_spec(name) for name in EXPORTERS):
        told = f"This environment lacks {' and '.join(EXPORTERS)}, which turn it into one a page can run"
        return Entry(title, [*notes, f"{told}; run make setup. {remedy}"])
    world = start(step)
    if world is None:
        return Entry(title, [*notes, "The store holds out no clip of its length to start from."])
    context = world.context(0)
    look = export_look(step, context) if size + weight_bytes([step.model.encoder]) <= LARGEST else None
    return Entry(title, notes, world, export(step, context), look, digest(step))


def weight_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of the weights of modules."""
    return sum(value.nbytes for module in modules for value in module.state_dict().values())


def step_modules(step: Step) -> list[nn.Module]:
    """The modules that a step of imagination runs."""
    model = step.model
    return [model.dynamics, model.decoder, model.heads, *filter(None, (step.actor, step.critic))]


def digest(step: Step) -> str:
    """What tells a model's weights from another's: eight hexadecimal digits."""
    found = hashlib.sha256()
    for name, value in sorted(step.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()[:8]


def describe(step: Step, root: Path = Path()) -> tuple[str, list[str]]:
    """What model this is: a title, and sentences on its kind, its size, and how its error grows."""
    spec, described = step.spec, step.described
    name, modules = METHODS.get(spec.method, spec.method), step_modules(step)
    count, size = sum(p.numel() for part in modules for p in part.parameters()), weight_bytes(modules)
    if spec.stage == "finetune":
        title = f"{name}, fine-tuned on {described.get('task', 'a task')}"
        kind = "It is controlled by the robot’s actions, predicts rewards and comes with a policy."
    else:
        title, kind = f"{name}, pre-trained on video", "It was trained on video without actions."
    notes = [f"{kind} One step uses {count / 1e6:.2g} million weights, {size / 1e6:.1f} MB."]
    path = root / EVALUATE / ERRORS[spec.stage]
    table = read_tsv(path) if path.is_file() else {}
    if table.get("step"):
        ahead, model, copy = (table[key] for key in ("step", "model", "copy"))
        places = sorted({0, len(ahead) // 2, len(ahead) - 1})
        grown = ", ".join(f"{model[i]:.4f} ({copy[i]:.4f}) at {ahead[i]:.0f}" for i in places)
        notes.append(
            "Mean squared error of the imagined frames by steps since the last true frame, pixels in [0, 1] "
            f"(in brackets: copying the last true frame): {grown}."
        )
    return title, notes


def render(entries: Sequence[Entry], found: runtime.Runtime | None, *, socket: str | None = None) -> str:
    """The page's text. `socket` is the address of the server that steps the models, None where it does."""
    blocks: dict[str, bytes] = {}
    told = []
    for number, entry in enumerate(entries):
        described: dict[str, Any] = {"title": entry.title, "notes": list(entry.notes), "playable": False}
        if entry.world is not None and (socket or found):
            looks = socket is not None or entry.look is not None
            described |= {"playable": True, "about": entry.world.about, "mark": entry.mark, "looks": looks}
            blocks[f"world-{number}"] = entry.world.content()
            if not socket:
                assert entry.graph is not None
                blocks[f"model-{number}"] = entry.graph
                if entry.look is not None:
                    blocks[f"look-{number}"] = entry.look
        told.append(described)
    if blocks and not socket:
        assert found is not None
        blocks |= {"runtime": found.script, "wasm": found.wasm}
    scripts = [(TEMPLATES / name).read_text(encoding="utf-8") for name in ("core.js", "gif.js", "app.js")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    page: str = (
        environment()
        .get_template("simulator.html.jinja")
        .render(
            entries=told,
            setup={"entries": told, "socket": socket},
            lacking=None if found or socket else runtime.COMMAND,
            notice=runtime.NOTICE if "runtime" in blocks else None,
            blocks={name: pack(content) for name, content in blocks.items()},
            scripts=scripts,
            hashes=hashes,
            socket=socket,
        )
    )
    return page


def pack(content: bytes) -> str:
    """Bytes as the page holds them: compressed, in base64."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode("ascii")


def environment() -> Environment:
    """The templates, with the report's frame and style."""
    return Environment(
        loader=FileSystemLoader([TEMPLATES, STYLE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
