"""The four methods as rows of one table, and how a world model is built from a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prelar.model.actions import ActionMLP, ActionPart, NoAction, RawAction, VideoAction
from prelar.model.layers import MLP, initialise
from prelar.model.rssm import RSSM, StackedRSSM
from prelar.model.spec import ModelSpec
from prelar.model.vision import (
    ContextDecoder,
    ContextEncoder,
    PlainDecoder,
    PlainEncoder,
    ResNetDecoder,
    ResNetEncoder,
)
from prelar.model.world_model import WorldModel
from prelar.utils.errors import UserError

M = TypeVar("M", bound=nn.Module)

SLOT = 50
"""Width of the action slot of APV's and ContextWM's RSSMs."""


def _video(spec: ModelSpec) -> ActionPart:
    return VideoAction(
        cnn_depth=spec.cnn_depth,
        hidden=spec.hidden,
        action_dim=spec.action_dim,
        kind=spec.action_kind,
        window=spec.action_window,
        consistency=spec.consistency,
    )


def _mlp(spec: ModelSpec) -> ActionPart:
    return ActionMLP(robot_action_dim=spec.robot_action_dim, hidden=spec.hidden, action_dim=spec.action_dim)


def _context_encoder(spec: ModelSpec) -> nn.Module:
    return ContextEncoder(cnn_depth=spec.cnn_depth, frame=spec.context_frame, augment=spec.context_augment)


def _decoder(kind: type[ResNetDecoder]) -> Callable[[ModelSpec], nn.Module]:
    return lambda spec: kind(
        cnn_depth=spec.cnn_depth, feature_dim=spec.feature_dim, least_channels=spec.decoder_channels
    )


def _rssm(spec: ModelSpec, *, embed_dim: int, action_dim: int) -> RSSM:
    return RSSM(
        embed_dim=embed_dim,
        action_dim=action_dim,
        hidden=spec.hidden,
        deter=spec.deter,
        stoch=spec.stoch,
        discrete=spec.discrete,
    )


@dataclass(frozen=True)
class Method:
    """What sets one method apart.

    `pretrains`: whether it pre-trains at all. `encoder`, `decoder`: makers of its vision. `video_action`,
    `robot_action`: makers of the action part for pre-training and fine-tuning.
    `stacked`: whether an action-conditional RSSM is stacked on the loaded one. `loads`: which
    pre-trained part fine-tuning loads into which submodule. `frozen`: submodules whose learning rate is 0 in
    the first updates. `bonus_source`: what the exploration bonus looks at, None: no bonus. `dual`: whether it
    has a second reward head.
    """

    pretrains: bool
    encoder: Callable[[ModelSpec], Any]
    decoder: Callable[[ModelSpec], nn.Module]
    video_action: Callable[[ModelSpec], ActionPart]
    robot_action: Callable[[ModelSpec], ActionPart]
    stacked: bool = False
    loads: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    frozen: tuple[str, ...] = ()
    bonus_source: str | None = None
    dual: bool = False


_ONE = MappingProxyType({"encoder": "encoder", "decoder": "decoder", "dynamics": "dynamics"})
_LOWER = MappingProxyType({"encoder": "encoder", "decoder": "decoder", "dynamics": "dynamics.lower"})

_DREAMERV2 = Method(
    pretrains=False,
    encoder=lambda spec: PlainEncoder(cnn_depth=spec.cnn_depth),
    decoder=lambda spec: PlainDecoder(cnn_depth=spec.cnn_depth, feature_dim=spec.feature_dim),
    video_action=lambda spec: NoAction(slot=spec.robot_action_dim),
    robot_action=lambda spec: RawAction(robot_action_dim=spec.robot_action_dim, slot=spec.robot_action_dim),
)
_APV = Method(
    pretrains=True,
    encoder=lambda spec: ResNetEncoder(cnn_depth=spec.cnn_depth),
    decoder=_decoder(ResNetDecoder),
    video_action=lambda spec: NoAction(slot=SLOT),
    robot_action=lambda spec: RawAction(robot_action_dim=spec.robot_action_dim, slot=SLOT),
    stacked=True,
    loads=_LOWER,
    frozen=("encoder", "dynamics.lower"),
    bonus_source="lower",
    dual=True,
)
_CONTEXTWM = replace(_APV, encoder=_context_encoder, decoder=_decoder(ContextDecoder))
_PRELAR = replace(
    _APV,
    video_action=_video,
    robot_action=_mlp,
    stacked=False,
    loads=_ONE,
    frozen=("encoder", "dynamics"),
    bonus_source="embed",
)
_NAIVE_STACK: dict[str, Any] = {
    "stacked": False,
    "loads": _ONE,
    "frozen": ("encoder", "dynamics"),
    "bonus_source": None,
    "dual": False,
}

METHODS: Mapping[str, Method] = MappingProxyType(
    {"dreamerv2": _DREAMERV2, "apv": _APV, "contextwm": _CONTEXTWM, "prelar": _PRELAR}
)
NAIVE: Mapping[str, Method] = MappingProxyType(
    {
        "apv": replace(_APV, **_NAIVE_STACK),
        "contextwm": replace(_CONTEXTWM, **_NAIVE_STACK),
        "prelar": replace(_PRELAR, bonus_source=None, dual=False),
    }
)


def find_method(method: str, naive: bool = False) -> Method:
    """The row of a method, or of its naive fine-tuning. Raises `UserError` where there is none."""
    if method not in METHODS:
        raise UserError(f"method = {method}: no such method; choose one of {', '.join(METHODS)}")
    if naive and method not in NAIVE:
        raise UserError(f"naive = true: {method} loads nothing to fine-tune naively; set naive to false")
    return (NAIVE if naive else METHODS)[method]


def build_model(spec: ModelSpec) -> WorldModel:
    """The world model that a spec describes, which then is its `spec`.

    Weights are drawn from torch's global generator. Raises `UserError` for values that do not fit together.
    """
    finetunes = spec.stage == "finetune"
    row = find_method(spec.method, finetunes and spec.naive)
    action = (row.robot_action if finetunes else row.video_action)(spec)
    encoder = row.encoder(spec)
    decoder = row.decoder(spec)
    dynamics: RSSM | StackedRSSM
    lower = dynamics = _rssm(spec, embed_dim=encoder.embed_dim, action_dim=action.action_dim)
    heads = {}
    if finetunes:
        if row.stacked:
            upper = _rssm(spec, embed_dim=spec.feature_dim, action_dim=action.action_dim)
            dynamics = StackedRSSM(lower, upper)
        names = ("reward", "dual_reward") if row.dual and spec.dual_reward else ("reward",)
        heads = {name: MLP(spec.feature_dim, 1, units=spec.units, layers=spec.layers) for name in names}
    model = WorldModel(
        encoder=encoder,
        decoder=decoder,
        dynamics=dynamics,
        action=action,
        heads=heads,
        frozen=row.frozen if finetunes else (),
        bonus_source=row.bonus_source if finetunes and spec.bonus else None,
        spec=spec,
    )
    initialise(model)
    return model


def restore(build: Callable[[], M], load: Callable[[M], None]) -> M:
    """The module that `build` makes, with the weights that `load` puts into it.

    A file may claim any size: weights of the shapes that it leads to must be there before numbers are.
    Raises `UserError` where the weights do not fit.
    """
    with torch.device("meta"):
        outline = build()
    load(outline)
    model = build()
    load(model)
    return model


def loads(method: str, naive: bool = False) -> tuple[str, ...]:
    """The names of the pre-trained parts that fine-tuning loads."""
    return tuple(find_method(method, naive).loads)


def load_pretrained(model: WorldModel, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load a pre-training checkpoint's parts into a model to fine-tune, as its row says.

    Raises `UserError` where a part is missing or does not fit.
    """
    row = find_method(model.spec.method, model.spec.naive)
    for part, target in row.loads.items():
        model.load_part(target, parts, part)
