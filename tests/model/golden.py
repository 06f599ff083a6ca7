"""The golden values: small reference models with known weights, inputs and outputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from prelar.import_reference import convert
from prelar.methods import build_model
from prelar.model.layers import BatchNorm
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel

FOLDER = Path(__file__).parents[1] / "golden"


@functools.cache
def read_golden(method: str) -> Mapping[str, Tensor]:
    """All arrays of a method's golden file, not to be changed."""
    with np.load(FOLDER / f"{method}_pretrain_small.npz", allow_pickle=False) as file:
        return MappingProxyType({name: torch.from_numpy(file[name]) for name in file.files})


def weights(golden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference model's weights under its own names."""
    return {name.removeprefix("w/"): value for name, value in golden.items() if name.startswith("w/")}


def inputs(golden: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Images in [-0.5, 0.5] and `is_first`."""
    return golden["in/image"].float() / 255 - 0.5, golden["in/is_first"]


def golden_model(method: str, golden: Mapping[str, Tensor]) -> WorldModel:
    """Our model with the golden weights, in evaluation mode, as it was when the outputs were computed."""
    sizes = {
        name.removeprefix("cfg/"): int(value) for name, value in golden.items() if name.startswith("cfg/")
    }
    model = build_model(ModelSpec(method=method, context_frame="first", **sizes))
    parts, unknown = convert(weights(golden))
    assert not unknown
    model.load_state(parts)
    _take_back_training_pass(model, inputs(golden)[0])
    return model.eval()


def _take_back_training_pass(model: WorldModel, images: Tensor) -> None:
    """Restore the encoder's running statistics of before the pass with batch statistics.

    The golden files hold the encoder's statistics after the one pass that gave `embed_train_mode`, while all
    other outputs were computed before it. Each moved by a tenth towards the batch's, which that pass gives
    again.
    """
    layers = [module for module in model.encoder.modules() if isinstance(module, BatchNorm)]
    stored = {layer: (layer.running_mean.clone(), layer.running_var.clone()) for layer in layers}

    def restore(layer: BatchNorm, arguments: tuple[Tensor, bool], _: Tensor) -> None:
        batch = arguments[0]
        mean, var = stored[layer]
        layer.running_mean.copy_((mean - 0.1 * batch.mean((0, 2, 3))) / 0.9)
        layer.running_var.copy_((var - 0.1 * batch.var((0, 2, 3))) / 0.9)

    hooks = [layer.register_forward_hook(restore) for layer in layers]
    with torch.no_grad():
        model.encoder(images, True)
    for hook in hooks:
        hook.remove()
