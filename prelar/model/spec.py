"""What a model is: the one value that builds it, and that a checkpoint's config.json holds as `model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prelar.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Method, sizes, action part, context and weights of a world model.

    `stage` is pretrain or finetune. `cnn_depth` counts channels of the vision, of which the last maps of a
    ResNet decoder have at least `decoder_channels`; `decoded` is the share of a segment's frames whose
    pictures a training step compares; `hidden`, `deter`, `stoch` and `discrete` are the RSSM's
    sizes. `robot_action_dim` only sizes the unused action slot of DreamerV2 where the stage is pretrain.
    `beta`, `beta_a` and `beta_c` weight the KL of the dynamics, the KL of the action and the consistency.
    `naive`, `dual_reward`, `bonus`, `context_augment` and the reward heads' `units` and `layers` belong to
    fine-tuning; a `bonus` of 0 means no exploration bonus. `frame_gap` is the time in seconds between the
    frames that it was pre-trained on, None: neighbours, whatever their rate.
    """

    method: str
    cnn_depth: int
    hidden: int
    deter: int
    stoch: int
    discrete: int
    stage: str = "pretrain"
    decoder_channels: int = 0
    decoded: float = 1.0
    action_dim: int = 64
    action_kind: str = "gaussian"
    action_window: int = 2
    consistency: str = "order"
    context_frame: str = "random"
    context_augment: str = "none"
    beta: float = 1.0
    beta_a: float = 1.0
    beta_c: float = 1.0
    robot_action_dim: int = 4
    naive: bool = False
    dual_reward: bool = True
    bonus: float = 1.0
    units: int = 400
    layers: int = 4
    frame_gap: float | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any], *, stage: str, source: str) -> ModelSpec:
        """The spec of a checkpoint of `stage`, whose types and bounds were checked where it was read.

        Raises `UserError` that names `source` where the values are another version's.
        """
        try:
            return cls(**{**values, "stage": stage})
        except TypeError as error:
            raise UserError(
                f"{source}: made by another version ({error}); make it again with `dvc repro`"
            ) from None

    def stride(self, fps: float) -> int:
        """Frames from one to the next that it looks at, in footage of `fps` frames a second; at least 1."""
        return 1 if self.frame_gap is None else max(1, round(self.frame_gap * fps))

    @property
    def feature_dim(self) -> int:
        """Width of what heads, decoder and policy see of a state."""
        return self.stoch * self.discrete + self.deter
