"""`python -m prelar import-reference`: a published checkpoint becomes the one that fine-tuning starts from.

The published code saves a whole model (names that start with `wm.`) or a file for each part. Sizes are read
off the shapes. A tensor that is not in the file, or does not fit, keeps its initial value and is named.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prelar import pretrain, torch_file
from prelar.config import Config, Scales, misfits
from prelar.methods import build_model, find_method, loads
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.torch_file import TensorView
from prelar.train.checkpoint import check_finite, load_config, load_parts, save_parts
from prelar.utils import zips
from prelar.utils.errors import UserError, one_line, printable

PREFIXES = {
    "encoder.": "encoder",
    "heads.decoder.": "decoder",
    "decoder.": "decoder",
    "rssm.": "dynamics",
    "af_rssm.": "dynamics",
    "va_encoder.": "action",
}
"""Where a part's names begin in a whole checkpoint."""

_RESIDUAL = [
    (r"\bres(\d)\.stack\.(\d)\.", r"stages.\1.\2."),
    (r"\bres_block\.0\.", "conv1."),
    (r"\bres_block\.1\.", "norm1."),
    (r"\bres_block\.3\.", "conv2."),
    (r"\bres_block\.4\.", "norm2."),
    (r"\bidentity\.0\.", "skip."),
    (r"\bidentity\.1\.", "skip_norm."),
]
_TRUNK = [*_RESIDUAL, (r"\bconvin\.(?:0\.)?(weight|bias)$", r"stem.\1")]

RULES: Mapping[str, list[tuple[str, str]]] = {
    "encoder": [
        (r"^_cnn_net\.", "trunk."),
        (r"^_deco_net\.", "context_trunk."),
        (r"^_cnn_nn\.conv(\d)\.", r"convs.\1."),
        *_TRUNK,
    ],
    "decoder": [
        *_TRUNK,
        (r"^_cnn_nn\.conv(\d)\.", r"convs.\1."),
        (r"^_cnn_nn\.", ""),
        (r"^convout\.", "out."),
        (r"\bkv_pos_emb$", "attention.context_position"),
        (r"\bq_pos_emb$", "attention.query_position"),
        (r"\bcross_attention\.att\.in_proj_", "attention.project."),
        (r"\bcross_attention\.att\.out_proj\.", "attention.out."),
        (r"\bnorm_cross_att\.", "norm."),
    ],
    "dynamics": [
        (r"^_img_in\.0\.", "input."),
        (r"^_cell\._layer\.", "cell.gates."),
        (r"^_cell\._norm\.", "cell.norm."),
        (r"^_ensemble_out_layers\.0\.img_out_0\.", "prior.hidden."),
        (r"^_ensemble_out_layers\.0\.img_out_head_0\.", "prior.out."),
        (r"^_obs_out\.0\.", "posterior.hidden."),
        (r"^_obs_out\.obs_out_head\.", "posterior.out."),
    ],
    "action": [
        (r"^va_encoder\._cnn_net\.", "trunk."),
        *_TRUNK,
        (r"^action_in\.0\.", "hidden."),
        (r"^action_in\.2\.", "out."),
    ],
}
"""For each part the substitutions that turn its published names into ours, applied in order."""

_INSIDE = ("conv1.", "norm1.", "conv2.", "norm2.", "skip.", "skip_norm.")


def rename(part: str, name: str) -> str:
    """Our name of a part's weight that is called `name` in the published code."""
    for pattern, replacement in RULES[part]:
        name = re.sub(pattern, replacement, name)
    return name


def _nest(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the residual layers that carry an attention one level deeper, as ours are."""
    attentive = {name.split("attention.")[0] for name in state if "attention." in name}
    nested = {}
    for name, value in state.items():
        layer = next((one for one in attentive if name.startswith(one)), None)
        if layer is not None and name.removeprefix(layer).startswith(_INSIDE):
            name = f"{layer}residual.{name.removeprefix(layer)}"
        nested[name] = value
    return nested


def _locate(name: str) -> tuple[str, str] | None:
    """The part a name of a whole checkpoint belongs to, and the name inside it."""
    name = name.removeprefix("wm.")
    for prefix, part in PREFIXES.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    return None


def convert(
    weights: Mapping[str, Tensor], part: str | None = None
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Translate published weights: the state dict of each part found, and the names that belong to none.

    `part` ("encoder", "decoder", "dynamics" or "action") says which one a file of a single part holds;
    without it the names say. Counters of batch normalisation are dropped; ours have none.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, value in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        found = (part, name) if part is not None else _locate(name)
        if found is None:
            unknown.append(name)
            continue
        state = parts.setdefault(found[0], {})
        state[rename(*found)] = value
    return {name: _nest(state) for name, state in parts.items()}, unknown


PARTS = {"encoder": "encoder", "decoder": "decoder", "rssm": "dynamics", "action_encoder": "action"}
"""The published names of the parts, and ours."""
SIZES = ("cnn_depth", "hidden", "deter", "stoch", "discrete", "action_dim", "action_kind", "action_window")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LINES_SHOWN, MANY = 6, 40
MOST, WHOLE = 10_000, 32  # tensors, and how many times as large as one of its parts a model may be
SHARED = 4  # how many times a file's numbers may stand under several names

Spec = dict[str, Any]
Parts = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Fit:
    """How a part's state dict compares with the model's: what fits, and lines on what does not."""

    fitting: dict[str, Tensor]
    misfits: list[str]
    missing: list[str]
    extra: list[str]

    @classmethod
    def of(cls, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Fit:
        """Compare `state` with the model's `own`."""
        shared = {name: value for name, value in state.items() if name in own}
        fitting = {n: v.to(own[n].dtype) for n, v in shared.items() if v.shape == own[n].shape}
        misfits = [
            f"{name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}"
            for name, value in shared.items()
            if name not in fitting
        ]
        return cls(fitting, misfits, sorted(own.keys() - shared.keys()), sorted(state.keys() - own.keys()))

    @property
    def whole(self) -> bool:
        """Whether every tensor of the model is there and fits."""
        return not self.misfits and not self.missing


def run(cfg: Config, file: Path, *, method: str, part: str | None = None, output: Path) -> None:
    """Turn the published checkpoint `file` into a pre-training checkpoint at `output`; print what fitted.

    `part`, a key of `PARTS`, says which part a file of one part holds. Parts that `output` already has for
    the same method and sizes are then kept, so that a model can be put together from its files; every other
    part that is not in the file starts from the seed of the params. Raises `UserError` for a file that is
    unreadable, holds anything but tensors, or no weight of `method`, and where `output` holds anything but a
    checkpoint, which would be lost.
    """
    find_method(method)
    _check_replaceable(output)
    weights = read_weights(file)
    name = None if part is None else PARTS[part]
    kept, candidates, imported = _present(output, method) if name else ({}, [], {})
    candidates += preset_specs(cfg, method)
    found, unknown = translate(weights, name, candidates[0])
    spec = infer_spec(file, found, candidates)
    _check_size(file, spec, weights, candidates)
    torch.manual_seed(cfg.seed)
    model = build_model(ModelSpec(**spec))
    lines = [f"{file.name}: {method}, {', '.join(f'{size} {spec[size]}' for size in SIZES)}"]
    lines += _load(file, model, found, kept, cfg.seed)
    if unknown:
        lines.append(f"  not used: {_summary(unknown)}")
    imported = {key: value for key, value in imported.items() if key in kept}
    config = {"stage": "pretrain", "model": model.spec, "step": 0}
    config["imported"] = imported | {key: file.name for key in found if key in model.parts()}
    save_parts(output, model.state(), config)
    needed = ", ".join(loads(method)) or "only the sizes"
    lines.append(f"-> {output}; fine-tuning loads of it: {needed}")
    print("\n".join(map(printable, lines)), flush=True)


# --- The file ---------------------------------------------------------------------------------------------


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name. Nothing in the file is run.

    Where state dicts lie inside others, the one with the most tensors is taken. Raises `UserError` where
    there is none, for anything but tensors and plain values, and for numbers that are not finite.
    """
    try:
        size = file.stat().st_size
        content, storages = torch_file.read(file)
        tensors = max(_state_dicts(content), key=len, default={})
        _check_claims(file, tensors, size)
        weights = {name: value.tensor(storages) for name, value in tensors.items()}
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; name a published checkpoint") from None
    except PermissionError as error:
        raise UserError(f"{file}: unreadable ({error.strerror}); mend its permissions") from None
    except (*zips.ERRORS, MemoryError) as error:
        raise UserError(
            f"{file}: not a file of tensors alone, or damaged ({one_line(error)}); nothing in it was "
            "run; download it again, or save its state dict with torch.save"
        ) from None
    try:
        check_finite(weights)
    except ValueError as error:
        raise UserError(f"{file}: {error}; take another checkpoint") from None
    return weights


def _check_claims(file: Path, tensors: Mapping[str, TensorView], size: int) -> None:
    """Raise `UserError` where a file holds no state dict, too many tensors, or fewer bytes than they claim.

    Several names may stand for the same numbers.
    """
    if not tensors:
        raise UserError(f"{file}: holds no state dict; name a published checkpoint")
    if len(tensors) > MOST:
        raise UserError(f"{file}: {len(tensors)} tensors in a state dict, more than {MOST}; take another")
    largest = max(tensors, key=lambda name: tensors[name].nbytes)
    if tensors[largest].nbytes > size or sum(one.nbytes for one in tensors.values()) > SHARED * size:
        raise UserError(f"{file}: {largest} claims more numbers than the file holds; download it again")


def _state_dicts(content: Any) -> list[dict[str, TensorView]]:
    """Every mapping in nested mappings that holds weights: names with dense tensors of floats.

    Each is looked at once, wherever it stands.
    """
    found, waiting, seen = [], [content], {id(content)}
    while waiting:
        mapping = waiting.pop()
        if not isinstance(mapping, Mapping):
            continue
        weights = {
            name.removeprefix("module."): value
            for name, value in mapping.items()
            if isinstance(name, str) and isinstance(value, TensorView) and value.storage.dtype in FLOATS
        }
        if weights:
            found.append(weights)
        inner = [value for value in mapping.values() if isinstance(value, Mapping) and id(value) not in seen]
        seen.update(map(id, inner))
        waiting += reversed(inner)
    return found


def translate(weights: Mapping[str, Tensor], part: str | None, spec: Spec) -> tuple[Parts, list[str]]:
    """Our parts in a file of published names, and the names that belong to none.

    Of a file that is said to hold one part, names with and without the part in front are both understood.
    A whole APV after fine-tuning has two RSSMs, of which the action-free one (`af_rssm`) was pre-trained.
    """
    if any(".af_rssm." in f".{name}" for name in weights):
        upper = [name for name in weights if name.removeprefix("wm.").startswith("rssm.")]
    else:
        upper = []
    whole, unknown = convert({name: value for name, value in weights.items() if name not in upper})
    if part is None:
        return whole, unknown + upper
    with torch.device("meta"):
        module = build_model(ModelSpec(**spec)).parts().get(part)
    if module is None:
        raise UserError(f"--part: {spec['method']} has no such part; leave the file out")
    alone, _ = convert(weights, part)
    states = [alone, {part: whole.get(part, {})}]
    best = max(states, key=lambda parts: len(parts.get(part, {}).keys() & module.state_dict().keys()))
    return best, [] if best is alone else sorted(unknown + upper)


# --- The sizes --------------------------------------------------------------------------------------------


def preset_specs(cfg: Config, method: str) -> list[Spec]:
    """The keywords that would build the published method at each scale of the params, the chosen first."""
    scales = [cfg.scale, *(scale for scale in Scales.model_fields if scale != cfg.scale)]
    with torch.device("meta"):
        return [
            asdict(pretrain.build(cfg.model_copy(update={"method": method, "scale": scale})).spec)
            | {"decoder_channels": 0}
            for scale in scales
        ]


def infer_spec(file: Path, parts: Parts, candidates: Sequence[Spec]) -> Spec:
    """The keywords that build the model whose weights these are.

    What the shapes leave open is taken from the first of `candidates` that agrees with them, else from the
    very first. Raises `UserError` where stoch and discrete, of which a file has the product, stay unknown.
    """
    with torch.device("meta"):
        model = build_model(ModelSpec(**candidates[0]))
    latent_actions = "action" in model.parts()
    sizes = measure(parts, model.embed_dim // candidates[0]["cnn_depth"])
    slot = sizes.pop("slot", None)
    if slot and latent_actions:
        sizes["action_dim"] = slot
    elif slot and not find_method(candidates[0]["method"]).pretrains:
        sizes["robot_action_dim"] = slot
    agreeing = [spec for spec in candidates if sizes.items() <= _dims(spec).items()]
    spec = dict((agreeing or candidates)[0])
    latent, feature = sizes.pop("latent", None), sizes.pop("feature", None)
    spec |= sizes
    if latent is None and feature is not None:
        latent = feature - spec["deter"]
    if latent is not None and latent != spec["stoch"] * spec["discrete"]:
        spec["stoch"] = spec["discrete"] = math.isqrt(max(latent, 0))
        if latent < 4 or spec["stoch"] ** 2 != latent:
            raise UserError(
                f"{file}: stoch · discrete = {latent} in it, which no scale of params.yaml has; "
                "import the rssm first, or set stoch and discrete to theirs"
            )
    return spec | (_action_family(parts["action"], spec) if latent_actions and "action" in parts else {})


def _dims(spec: Spec) -> Spec:
    """What `measure` would find of a model."""
    latent = spec["stoch"] * spec["discrete"]
    return spec | {"latent": latent, "feature": latent + spec["deter"]}


def measure(parts: Parts, per_depth: int) -> dict[str, int]:
    """The sizes that the shapes tell: those they name, `latent` (stoch · discrete), `feature` and `slot`.

    `per_depth` is the width of the embedding at a `cnn_depth` of 1, and that of the decoder's first layer.
    """

    def axis(part: str, name: str, number: int) -> int:
        value = parts.get(part, {}).get(name, torch.empty(0))
        return value.shape[number] if value.numel() and value.dim() > max(number, 1) else 0

    latent, deter = axis("dynamics", "prior.out.weight", 0), axis("dynamics", "cell.gates.weight", 0) // 3
    embed = axis("dynamics", "posterior.hidden.weight", 1) - deter if deter else 0
    depths = (
        axis("encoder", "trunk.stem.weight", 0),
        axis("encoder", "convs.0.weight", 0),
        axis("decoder", "stem.weight", 0) // per_depth,
        axis("action", "trunk.stem.weight", 0),
        embed // per_depth,
    )
    sizes = {
        "cnn_depth": next(filter(None, depths), 0),
        "hidden": axis("dynamics", "input.weight", 0) or axis("action", "hidden.weight", 0),
        "deter": deter,
        "latent": latent,
        "feature": latent + deter if latent and deter else axis("decoder", "stem.weight", 1),
        "slot": axis("dynamics", "input.weight", 1) - latent if latent else 0,
        "action_window": axis("action", "trunk.stem.weight", 1) // 3,
    }
    return {name: size for name, size in sizes.items() if size > 0}


def _check_size(file: Path, spec: Spec, weights: Mapping[str, Tensor], candidates: Sequence[Spec]) -> None:
    """Raise `UserError` where the sizes that the shapes tell make a model far larger than the file.

    A file may hold one part of several, and the others then start from the seed.
    """
    if problem := misfits(spec):
        raise UserError(f"{file}: its shapes say {problem}; name a published checkpoint")
    with torch.device("meta"):
        models = [build_model(ModelSpec(**one)) for one in (spec, *candidates)]
    size, *known = [sum(value.numel() for value in model.parameters()) for model in models]
    held = sum(value.numel() for value in weights.values())
    if size > max(WHOLE * held, *known):
        raise UserError(f"{file}: {held} numbers, whose shapes say a model of {size}; download it again")


def _action_family(state: Mapping[str, Tensor], spec: Spec) -> Spec:
    """The latent action's size and family, from the width of the action encoder's output."""
    if "out.weight" not in state:
        return {}
    width, size, kind = len(state["out.weight"]), spec["action_dim"], spec["action_kind"]
    if width == 2 * size:
        kind = "gaussian"
    elif width == size:
        kind = "deterministic" if kind == "gaussian" else kind
    else:
        size = width // 2 if kind == "gaussian" else width
    return {"action_dim": size, "action_kind": kind}


# --- The checkpoint ---------------------------------------------------------------------------------------


def _check_replaceable(output: Path) -> None:
    """Raise `UserError` where something lies at `output` that is neither a checkpoint nor an empty folder."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        config = load_config(output)
    except UserError:
        config = {"parts": []}
    known = {"config.json", *(f"{part}.safetensors" for part in config["parts"])}
    if not output.is_dir() or not {path.name for path in output.iterdir()} <= known:
        raise UserError(f"{output}: holds something that is no checkpoint; name another folder, or remove it")


def _present(output: Path, method: str) -> tuple[Parts, list[Spec], dict[str, str]]:
    """Parts, keywords and origins of the checkpoint that is there; nothing where it is of another method."""
    if not (output / "config.json").exists() or load_config(output).get("model", {}).get("method") != method:
        return {}, [], {}
    parts, config = load_parts(output)
    spec = ModelSpec.read(config["model"], stage="pretrain", source=str(output))
    return parts, [asdict(spec)], config.get("imported", {})


def _load(file: Path, model: WorldModel, found: Parts, kept: Parts, seed: int) -> list[str]:
    """Load what fits into the model; lines that say what did, a part each. `kept` loses what does not fit."""
    lines, loaded = [], 0
    for name, module in model.parts().items():
        own = module.state_dict()
        fit = Fit.of(own, found.get(name, {}))
        if name in found:
            kept.pop(name, None)
            module.load_state_dict(own | fit.fitting)
            loaded += len(fit.fitting)
            lines.append(f"  {name}: {len(fit.fitting)} of {len(own)} tensors")
            lines += _named("does not fit", fit.misfits)
            lines += _named("not found", fit.missing)
            lines += _named("not used", fit.extra)
        elif name in kept and (old := Fit.of(own, kept[name])).whole:
            module.load_state_dict(old.fitting)
            lines.append(f"  {name}: kept as it was")
        else:
            kept.pop(name, None)
            lines.append(f"  {name}: not found; initialised from seed {seed}")
    lines += [f"  {name}: not used; the method has none" for name in found if name not in model.parts()]
    if not loaded:
        raise UserError(
            f"{file}: no weight in it fits {model.spec.method} under its published names; "
            "give --part for a file of one part, or another --method"
        )
    return lines


def _named(what: str, lines: Sequence[str]) -> list[str]:
    """The first few lines, and how many more there are."""
    shown = [f"    {what}: {line}" for line in lines[:LINES_SHOWN]]
    return shown + ([f"    {what}: {len(lines) - LINES_SHOWN} more"] if len(lines) > LINES_SHOWN else [])


def _summary(names: Sequence[str]) -> str:
    """Names grouped by their first three words, with counts."""
    groups = Counter(".".join(name.split(".")[:3]) for name in names)
    shown = [name if count == 1 else f"{name}.* ({count})" for name, count in groups.most_common(MANY)]
    return ", ".join(shown + ([f"{len(groups) - MANY} more"] if len(groups) > MANY else []))
