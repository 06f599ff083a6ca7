"""Building blocks: normalisation, residual trunks, cross-attention, the GRU cell and the MLP.

Whether batch statistics, dropout and masking are on is an argument, `training`, never a mode of the module,
so one network serves a training batch and an acting step without anybody switching it back and forth.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prelar.utils.distributed import all_gather_rows, dropout, sample_global, world
from prelar.utils.errors import UserError


def initialise(module: nn.Module) -> None:
    """Give every layer Xavier-uniform weights, times its `gain` if it has one, and zero biases.

    Normalisation layers are left alone.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight, gain=getattr(layer, "gain", 1.0))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into a module of the very same architecture.

    A module on the meta device, which has no numbers, is only compared. Raises `UserError` that names
    `source` and the first tensor that is missing, unknown, of another shape, or of integers where the
    module's has floats.
    """
    own = module.state_dict()
    misfits = [f"no {name}" for name in own if name not in weights]
    misfits += [f"{name} is unknown" for name in weights if name not in own]
    misfits += [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    misfits += [
        f"{name} is {weights[name].dtype}, expected {value.dtype}"
        for name, value in own.items()
        if name in weights and weights[name].is_floating_point() != value.is_floating_point()
    ]
    if misfits:
        raise UserError(
            f"{source}: does not fit this architecture ({misfits[0]}); "
            "run `dvc repro` to make it with the present params.yaml"
        )
    if not any(value.is_meta for value in own.values()):
        module.load_state_dict(dict(weights))


MOMENTUM = 0.1
EPS = 1e-5


class MLP(nn.Module):
    """`layers` hidden layers of `units` with ELU, then a linear layer to `outputs`.

    Under autocast the last layer stays in the weights' own precision, as published.
    """

    def __init__(self, inputs: int, outputs: int, *, units: int, layers: int) -> None:
        super().__init__()
        sizes = [inputs] + [units] * layers
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs)."""
        for layer in self.hidden:
            x = F.elu(layer(x))
        kind = x.device.type  # meta, where operations are counted, knows no autocast
        off = nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
        with off:
            out: Tensor = self.out(x.to(self.out.weight.dtype))
        return out


class BatchNorm(nn.Module):
    """Batch normalisation over (N, H, W).

    `training=True` normalises with the batch's statistics and moves the running ones; `training=False` uses
    the running ones and changes nothing. The batch is the whole one where several processes share it.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, training: bool) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if training and world() > 1:
            return self._shared(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, MOMENTUM, EPS
        )

    def _shared(self, x: Tensor) -> Tensor:
        """Normalise with the statistics of the rows of all processes, each of which holds as many."""
        values = x.float()
        own_var, own_mean = torch.var_mean(values, (0, 2, 3), correction=0)
        means, variances = all_gather_rows(torch.cat([own_mean, own_var])[None]).chunk(2, 1)
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        with torch.no_grad():
            count = world() * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(var * (count / (count - 1)), MOMENTUM)
        scale = self.weight * torch.rsqrt(var + EPS)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], values, scale[:, None, None]).to(x.dtype)


class ResidualLayer(nn.Module):
    """conv 3×3, BN, ReLU, conv 3×3, BN, plus identity (1×1 conv and BN where the width changes), ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None
        self.skip_norm = BatchNorm(outputs) if inputs != outputs else None

    def forward(self, x: Tensor, training: bool, branch: Tensor | None = None) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W); `branch`, where given, feeds the convs instead of `x`."""
        y = F.relu(self.norm1(self.conv1(x if branch is None else branch), training), inplace=True)
        y = self.norm2(self.conv2(y), training)
        if self.skip is not None and self.skip_norm is not None:
            x = self.skip_norm(self.skip(x), training)
        return F.relu(x + y, inplace=True)


class ResNet(nn.Module):
    """Trunk of the ResNet encoder: 64×64 images to a 4·depth×4×4 map.

    conv 3×3 stride 2, ELU; three stages of two residual layers at 1, 2 and 4 times `depth` channels, each
    followed by a 2×2 average pool.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, depth, 3, stride=2, padding=1)
        widths = [depth, depth, 2 * depth, 4 * depth]
        self.stages = nn.ModuleList(
            nn.ModuleList([ResidualLayer(a, b), ResidualLayer(b, b)]) for a, b in pairwise(widths)
        )
        self.outputs = 4 * depth * 4 * 4

    def forward(self, x: Tensor, training: bool) -> list[Tensor]:
        """(N, C, 64, 64) -> the stages' maps before pooling (32×32, 16×16, 8×8), then the last one pooled."""
        maps = []
        x = F.elu(self.stem(x))
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                x = layer(x, training)
            maps.append(x)
            x = F.avg_pool2d(x, 2)
        return [*maps, x]


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of a map to those of a context map of the same size and width.

    Learned position embeddings (zeros at first) are added to queries and to keys and values. In training a
    random share `mask` of the context tokens, drawn anew for every map, is left out, and dropout is on
    (ContextWM).
    """

    def __init__(
        self, width: int, size: int, *, heads: int = 4, mask: float = 0.75, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.heads, self.mask, self.dropout = heads, mask, dropout
        self.query_position = nn.Parameter(torch.zeros(size * size, width))
        self.context_position = nn.Parameter(torch.zeros(size * size, width))
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, training: bool) -> Tensor:
        """x (B·T, C, H, W), context (B, C, H, W), T maps after one another per context -> (B·T, C, H, W)."""
        queries = x.flatten(2).transpose(1, 2) + self.query_position
        tokens = context.flatten(2).transpose(1, 2) + self.context_position
        width = queries.shape[-1]
        weight, bias = self.project.weight, self.project.bias
        q = F.linear(queries, weight[:width], bias[:width])
        k, v = F.linear(tokens, weight[width:], bias[width:]).chunk(2, -1)
        times = x.shape[0] // context.shape[0]
        k, v = (y.repeat_interleave(times, 0) for y in (k, v))
        if training:
            kept = max(1, int(tokens.shape[1] * (1 - self.mask)))
            drawn = sample_global(lambda shape: torch.rand(shape, device=x.device), tuple(k.shape[:2]))
            index = drawn.argsort(1)[:, :kept, None].expand(-1, -1, width)
            k, v = k.gather(1, index), v.gather(1, index)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        found = self._drop(q, k, v) if training else F.scaled_dot_product_attention(q, k, v)
        out = self.out(found.transpose(1, 2).flatten(2))
        out = dropout(out, self.dropout) if training else out
        return out.transpose(1, 2).reshape(x.shape)

    def _drop(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention with dropout that is drawn for the whole batch."""
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return dropout(weights, self.dropout).to(v.dtype) @ v


class AttentiveLayer(nn.Module):
    """A residual layer whose branch first attends to a context map: ReLU(x + BN(attention))."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.attention = CrossAttention(inputs, size)
        self.norm = BatchNorm(inputs)
        self.residual = ResidualLayer(inputs, outputs)

    def forward(self, x: Tensor, context: Tensor, training: bool) -> Tensor:
        """x (B·T, inputs, H, W), context (B, inputs, H, W) -> (B·T, outputs, H, W)."""
        found = self.norm(self.attention(x, context, training), training)
        out: Tensor = self.residual(x, training, branch=F.relu(x + found, inplace=True))
        return out


class NormGRUCell(nn.Module):
    """GRU cell of DreamerV2: one linear layer, LayerNorm (eps 1e-3) over all gates, update bias -1.

    The reset gate multiplies the whole candidate before its tanh.
    """

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.gates = nn.Linear(inputs + size, 3 * size)
        self.norm = nn.LayerNorm(3 * size, eps=1e-3)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """x (…, inputs), state (…, size) -> the new state (…, size), in float32."""
        gates = self.gates(torch.cat([x, state.to(x.dtype)], -1)).float()
        reset, candidate, update = self.norm(gates).chunk(3, -1)
        update = torch.sigmoid(update - 1)
        return torch.lerp(state, torch.tanh(torch.sigmoid(reset) * candidate), update)
