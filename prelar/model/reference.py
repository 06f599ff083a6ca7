"""Weights under the names of the published code, translated to ours.

The published checkpoints come whole (names that start with `wm.`) or by part (`rssm_variables.pt` and so on,
names without the part). Shapes are the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

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
