"""Vision: encoders answer (embedding, context), decoders take (feature, context)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prelar.model.layers import AttentiveLayer, ResidualLayer, ResNet
from prelar.utils.distributed import sample_global

Context = tuple[Tensor, ...]
"""Maps of the context frame, 8×8 then 16×16, each (B, C, H, W); empty for encoders without a context."""

NEARLY_GREY = 0.05
"""Gain of the first weights of a decoder's last layer, whose pictures are nearly grey, 0, then."""


class ResNetEncoder(nn.Module):
    """The ResNet encoder: 64×64 images to a vector of 64·cnn_depth."""

    def __init__(self, *, cnn_depth: int) -> None:
        super().__init__()
        self.trunk = ResNet(3, cnn_depth)
        self.embed_dim = self.trunk.outputs

    def embed(self, images: Tensor, training: bool = False) -> Tensor:
        """(…, 3, 64, 64) -> (…, E), in float32."""
        batch = images.shape[:-3]
        top = self.trunk(images.flatten(0, -4), training)[-1]
        return top.flatten(1).unflatten(0, batch).float()

    def context(self, images: Tensor, training: bool = False) -> Context:
        """(B, T, 3, 64, 64) -> no context."""
        return ()

    def forward(self, images: Tensor, training: bool = False) -> tuple[Tensor, Context]:
        """(B, T, 3, 64, 64) -> embedding (B, T, E) and context."""
        return self.embed(images, training), self.context(images, training)


class ResNetDecoder(nn.Module):
    """The ResNet decoder: a linear layer to 4·cnn_depth×4×4, three stages, a transposed conv.

    A stage is nearest ×2 and two residual layers, of which the second halves the width. A decoder of small
    depth finds the picture only where the last two stages leave it some channels, at least `least_channels`,
    and where its first pictures are nearly grey.
    """

    def __init__(self, *, cnn_depth: int, feature_dim: int, least_channels: int = 0) -> None:
        super().__init__()
        widths = [4 * cnn_depth, 2 * cnn_depth, max(cnn_depth, least_channels)]
        widths.append(max(widths[2] // 2, least_channels))
        self.width = widths[0]
        self.stem = nn.Linear(feature_dim, self.width * 4 * 4)
        self.stages = nn.ModuleList(
            self._stage(width, following, 8 << i) for i, (width, following) in enumerate(pairwise(widths))
        )
        self.out = nn.ConvTranspose2d(widths[-1], 3, 3, stride=2, padding=1, output_padding=1)
        if least_channels:
            self.out.gain = NEARLY_GREY  # type: ignore[assignment]

    def _stage(self, width: int, following: int, size: int) -> nn.ModuleList:
        """The two layers at `size`×`size` pixels, from `width` channels to those of the following stage."""
        return nn.ModuleList([ResidualLayer(width, width), ResidualLayer(width, following)])

    def _layers(self, x: Tensor, stage: int, context: Context, training: bool) -> Tensor:
        for layer in self.stages[stage]:  # type: ignore[attr-defined]
            x = layer(x, training)
        return x

    def forward(self, feature: Tensor, context: Context, training: bool = False) -> Tensor:
        """feature (B, …, F), context of B sequences -> images (B, …, 3, 64, 64), in float32."""
        x = self.stem(feature.flatten(0, -2)).unflatten(-1, (self.width, 4, 4))
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in range(len(self.stages)):
            x = self._layers(F.interpolate(x, scale_factor=2, mode="nearest"), stage, context, training)
        images: Tensor = self.out(x)
        return images.unflatten(0, feature.shape[:-1]).float()


class ContextEncoder(ResNetEncoder):
    """ContextWM's encoder: a second trunk sees one frame of the segment and hands its maps to the decoder.

    `frame` says which one: `first`, `last` or `random` (one per sequence, uniform). Outside of training
    `random` stands for the last frame, so that nothing is left to chance. In training `augment` is applied
    to that frame.
    """

    def __init__(self, *, cnn_depth: int, frame: str = "random", augment: str = "none") -> None:
        super().__init__(cnn_depth=cnn_depth)
        self.context_trunk = ResNet(3, cnn_depth)
        self.frame, self.augment = frame, augment

    def context(self, images: Tensor, training: bool = False) -> Context:
        """(B, T, 3, 64, 64) -> the context frame's 8×8 and 16×16 maps."""
        picked = images[torch.arange(len(images), device=images.device), self._pick(images, training)]
        with torch.no_grad():
            frame = AUGMENTATIONS[self.augment](picked) if training else picked
        maps = self.context_trunk(frame, training)
        return maps[2], maps[1]

    def _pick(self, images: Tensor, training: bool) -> Tensor:
        """The frame's number for each sequence (B,)."""
        batch, time = images.shape[:2]
        if self.frame == "random" and training:
            return sample_global(lambda shape: torch.randint(time, shape, device=images.device), (batch,))
        return torch.full((batch,), 0 if self.frame == "first" else time - 1, device=images.device)


class ContextDecoder(ResNetDecoder):
    """The ResNet decoder whose stages below 32×32 attend to the context maps in their first layer."""

    def _stage(self, width: int, following: int, size: int) -> nn.ModuleList:
        if size >= 32:
            return super()._stage(width, following, size)
        return nn.ModuleList([AttentiveLayer(width, width, size), ResidualLayer(width, following)])

    def _layers(self, x: Tensor, stage: int, context: Context, training: bool) -> Tensor:
        if stage >= len(context):
            return super()._layers(x, stage, context, training)
        layers: Any = self.stages[stage]
        halved: Tensor = layers[1](layers[0](x, context[stage], training), training)
        return halved


class PlainEncoder(nn.Module):
    """DreamerV2's encoder: four convs of kernel 4 and stride 2 with ELU, to a vector of 32·cnn_depth."""

    def __init__(self, *, cnn_depth: int) -> None:
        super().__init__()
        widths = [3] + [cnn_depth << i for i in range(4)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2) for a, b in pairwise(widths))
        self.embed_dim = 4 * widths[-1]

    def embed(self, images: Tensor, training: bool = False) -> Tensor:
        """(…, 3, 64, 64) -> (…, E), in float32."""
        x = images.flatten(0, -4)
        for conv in self.convs:
            x = F.elu(conv(x))
        return x.flatten(1).unflatten(0, images.shape[:-3]).float()

    def forward(self, images: Tensor, training: bool = False) -> tuple[Tensor, Context]:
        """(B, T, 3, 64, 64) -> embedding (B, T, E) and no context."""
        return self.embed(images, training), ()


class PlainDecoder(nn.Module):
    """DreamerV2's decoder: a linear layer to 32·cnn_depth, four transposed convs of kernels 5, 5, 6, 6."""

    def __init__(self, *, cnn_depth: int, feature_dim: int) -> None:
        super().__init__()
        widths = [32 * cnn_depth, 4 * cnn_depth, 2 * cnn_depth, cnn_depth, 3]
        self.stem = nn.Linear(feature_dim, widths[0])
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(a, b, kernel, stride=2)
            for a, b, kernel in zip(widths[:-1], widths[1:], (5, 5, 6, 6), strict=True)
        )

    def forward(self, feature: Tensor, context: Context, training: bool = False) -> Tensor:
        """feature (…, F) -> images (…, 3, 64, 64), in float32."""
        x = self.stem(feature.flatten(0, -2))[:, :, None, None]
        for i, conv in enumerate(self.convs):
            x = conv(F.elu(x) if i else x)
        return x.unflatten(0, feature.shape[:-1]).float()


def erase(
    images: Tensor,
    *,
    chance: float = 0.5,
    area: tuple[float, float] = (0.02, 0.33),
    aspect: tuple[float, float] = (0.3, 3.3),
) -> Tensor:
    """Random erasing (Zhong et al., 2020): with `chance` a rectangle of an image (B, C, H, W) turns grey, 0.

    The rectangle covers a share of the image drawn uniformly from `area`, its height over width is drawn
    log-uniformly from `aspect`, both are cut to the image, and its place is uniform.
    """
    batch, _, height, width = images.shape
    drawn = sample_global(lambda shape: torch.rand(shape, device=images.device), (5, batch), 1)
    covered = (area[0] + (area[1] - area[0]) * drawn[0]) * height * width
    low, high = (math.log(bound) for bound in aspect)
    ratio = (low + (high - low) * drawn[1]).exp()
    tall = (covered * ratio).sqrt().clamp(1, height)
    wide = (covered / ratio).sqrt().clamp(1, width)
    top, left = drawn[2] * (height - tall), drawn[3] * (width - wide)
    rows = torch.arange(height, device=images.device) + 0.5
    columns = torch.arange(width, device=images.device) + 0.5
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    hole = in_rows[:, :, None] & in_columns[:, None, :] & (drawn[4] < chance)[:, None, None]
    return images.masked_fill(hole[:, None], 0.0)


def unchanged(images: Tensor) -> Tensor:
    """No augmentation."""
    return images


AUGMENTATIONS = {"none": unchanged, "erase": erase}
