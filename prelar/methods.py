"""The four methods as rows of one table, and the two functions that build a world model from a row."""

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


@dataclass(frozen=True)
class Sizes:
    """The sizes that pre-training and fine-tuning share: channels of the vision, widths of the RSSM."""

    cnn_depth: int
    hidden: int
    deter: int
    stoch: int
    discrete: int

    @property
    def feature_dim(self) -> int:
        """Width of what heads, decoder and policy see of a state."""
        return self.stoch * self.discrete + self.deter

    def rssm(self, *, embed_dim: int, action_dim: int) -> RSSM:
        """An RSSM of these sizes."""
        return RSSM(
            embed_dim=embed_dim,
            action_dim=action_dim,
            hidden=self.hidden,
            deter=self.deter,
            stoch=self.stoch,
            discrete=self.discrete,
        )

    def vision(self, row: Method, **context: str) -> tuple[Any, Any]:
        """Encoder and decoder of a row; `context` are the context's settings, for rows that take them."""
        encoder = row.encoder(cnn_depth=self.cnn_depth, **(context if row.context else {}))
        return encoder, row.decoder(cnn_depth=self.cnn_depth, feature_dim=self.feature_dim)


def _raw(*, robot_action_dim: int, **_: Any) -> ActionPart:
    return RawAction(robot_action_dim=robot_action_dim, slot=robot_action_dim)


def _padded(*, robot_action_dim: int, **_: Any) -> ActionPart:
    return RawAction(robot_action_dim=robot_action_dim, slot=SLOT)


def _mlp(*, robot_action_dim: int, hidden: int, action_dim: int, **_: Any) -> ActionPart:
    return ActionMLP(robot_action_dim=robot_action_dim, hidden=hidden, action_dim=action_dim)


def _no_action(*, robot_action_dim: int, **_: Any) -> ActionPart:
    return NoAction(slot=robot_action_dim)


def _zeros(**_: Any) -> ActionPart:
    return NoAction(slot=SLOT)


def _video(
    *,
    cnn_depth: int,
    hidden: int,
    action_dim: int,
    action_kind: str,
    action_window: int,
    consistency: str,
    **_: Any,
) -> ActionPart:
    return VideoAction(
        cnn_depth=cnn_depth,
        hidden=hidden,
        action_dim=action_dim,
        kind=action_kind,
        window=action_window,
        consistency=consistency,
    )


@dataclass(frozen=True)
class Method:
    """What sets one method apart.

    `pretrains`: whether it pre-trains at all. `encoder`, `decoder`: its vision; `context`: whether they take
    the context's settings. `video_action`, `robot_action`: makers of the action part for pre-training and
    fine-tuning. `stacked`: whether an action-conditional RSSM is stacked on the loaded one. `loads`: which
    pre-trained part fine-tuning loads into which submodule. `held`: submodules held at learning rate 0 in the
    first updates. `bonus_source`: what the exploration bonus looks at, None: no bonus. `dual`: whether it has
    a second reward head.
    """

    pretrains: bool
    encoder: Any
    decoder: Any
    video_action: Any
    robot_action: Any
    context: bool = False
    stacked: bool = False
    loads: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    held: tuple[str, ...] = ()
    bonus_source: str | None = None
    dual: bool = False


_ONE = MappingProxyType({"encoder": "encoder", "decoder": "decoder", "dynamics": "dynamics"})
_LOWER = MappingProxyType({"encoder": "encoder", "decoder": "decoder", "dynamics": "dynamics.lower"})

_DREAMERV2 = Method(
    pretrains=False, encoder=PlainEncoder, decoder=PlainDecoder, video_action=_no_action, robot_action=_raw
)
_APV = Method(
    pretrains=True,
    encoder=ResNetEncoder,
    decoder=ResNetDecoder,
    video_action=_zeros,
    robot_action=_padded,
    stacked=True,
    loads=_LOWER,
    held=("encoder", "dynamics.lower"),
    bonus_source="lower",
    dual=True,
)
_CONTEXTWM = replace(_APV, encoder=ContextEncoder, decoder=ContextDecoder, context=True)
_PRELAR = replace(
    _APV,
    video_action=_video,
    robot_action=_mlp,
    stacked=False,
    loads=_ONE,
    held=("encoder", "dynamics"),
    bonus_source="embed",
)
_NAIVE_STACK: dict[str, Any] = {
    "stacked": False,
    "loads": _ONE,
    "held": ("encoder", "dynamics"),
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


def build_pretrain(
    *,
    method: str,
    action_dim: int = 64,
    action_kind: str = "gaussian",
    action_window: int = 2,
    consistency: str = "order",
    context_frame: str = "random",
    beta: float = 1.0,
    beta_a: float = 1.0,
    beta_c: float = 1.0,
    robot_action_dim: int = 4,
    **sizes: int,
) -> WorldModel:
    """The world model that learns from video. `model.spec` holds these keywords.

    `sizes` are those of `Sizes`. `robot_action_dim` only sizes the unused action slot of DreamerV2. Weights
    are drawn from torch's global generator. Raises `UserError` for values that do not fit together.
    """
    spec = _flat(locals())
    row, size = find_method(method), Sizes(**sizes)
    action = row.video_action(**spec)
    encoder, decoder = size.vision(row, frame=context_frame)
    weights = {"image": 1.0, "kl": beta, "action_kl": beta_a, "consistency": beta_c}
    model = WorldModel(
        encoder=encoder,
        decoder=decoder,
        dynamics=size.rssm(embed_dim=encoder.embed_dim, action_dim=action.action_dim),
        action=action,
        heads={},
        weights={name: weights[name] for name in ("image", "kl", *action.loss_names)},
        spec=spec,
    )
    initialise(model)
    return model


def build_finetune(
    *,
    method: str,
    robot_action_dim: int,
    units: int,
    layers: int,
    action_dim: int = 64,
    naive: bool = False,
    dual_reward: bool = True,
    bonus: float = 1.0,
    context_frame: str = "random",
    context_augment: str = "none",
    beta: float = 1.0,
    **sizes: int,
) -> WorldModel:
    """The world model that learns from a robot's experience. `model.spec` holds these keywords.

    `sizes` are those of `Sizes`; `units` and `layers` size the reward heads. `bonus` 0 means no exploration
    bonus. The second reward head exists where `dual_reward` is set and the method has one. Raises `UserError`
    for values that do not fit together.
    """
    spec = _flat(locals())
    row, size = find_method(method, naive), Sizes(**sizes)
    action = row.robot_action(**spec)
    encoder, decoder = size.vision(row, frame=context_frame, augment=context_augment)
    dynamics: RSSM | StackedRSSM
    lower = dynamics = size.rssm(embed_dim=encoder.embed_dim, action_dim=action.action_dim)
    weights = {"image": 1.0, "kl": beta, "reward": 1.0}
    if row.stacked:
        upper = size.rssm(embed_dim=size.feature_dim, action_dim=action.action_dim)
        dynamics = StackedRSSM(lower, upper)
        weights["lower_kl"] = 0.0
    heads = {"reward": MLP(size.feature_dim, 1, units=units, layers=layers)}
    if row.dual and dual_reward:
        heads["dual_reward"] = MLP(size.feature_dim, 1, units=units, layers=layers)
        weights["dual_reward"] = 1.0
    model = WorldModel(
        encoder=encoder,
        decoder=decoder,
        dynamics=dynamics,
        action=action,
        heads=heads,
        weights=weights,
        held=row.held,
        bonus_source=row.bonus_source if bonus else None,
        spec=spec,
    )
    initialise(model)
    return model


def restore(build: Callable[..., M], spec: Mapping[str, Any], load: Callable[[M], None], source: str) -> M:
    """The module that `build` makes of the keywords `spec`, with the weights that `load` puts into it.

    Keywords from a file may claim any size: weights of the shapes that they lead to must be there before
    numbers are. Raises `UserError` that names `source` where the keywords are another version's, or the
    weights do not fit.
    """
    try:
        with torch.device("meta"):
            outline = build(**spec)
    except TypeError as error:
        raise UserError(
            f"{source}: made by another version ({error}); make it again with `dvc repro`"
        ) from None
    load(outline)
    model = build(**spec)
    load(model)
    return model


def _flat(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A builder's keywords as one mapping, the sizes among the others."""
    return {name: value for name, value in keywords.items() if name != "sizes"} | keywords["sizes"]


def loads(method: str, naive: bool = False) -> tuple[str, ...]:
    """The names of the pre-trained parts that fine-tuning loads."""
    return tuple(find_method(method, naive).loads)


def load_pretrained(model: WorldModel, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load a pre-training checkpoint's parts into a model of `build_finetune`, as its row says.

    Raises `UserError` where a part is missing or does not fit.
    """
    row = find_method(model.spec["method"], model.spec["naive"])
    for part, target in row.loads.items():
        model.load_part(target, parts, part)
