"""The building blocks alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prelar.model.layers import (
    MLP,
    BatchNorm,
    CrossAttention,
    NormGRUCell,
    ResidualLayer,
    ResNet,
    initialise,
    load_weights,
)
from prelar.utils.errors import UserError


def test_batch_norm_equals_torch_in_both_cases() -> None:
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    for _ in range(3):
        x = 2 * torch.randn(4, 3, 5, 5) + 1
        torch.testing.assert_close(ours(x, True), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    theirs.eval()
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(ours(x, False), theirs(x))


def test_running_statistics_stay_where_they_are_outside_of_training() -> None:
    norm = BatchNorm(3)
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm.train()(torch.randn(4, 3, 5, 5) + 7, False)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


def test_residual_layer_keeps_the_identity_of_equal_widths() -> None:
    layer = ResidualLayer(3, 3)
    nn.init.zeros_(layer.norm2.weight)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(x, False), x.relu())
    assert layer.skip is None
    assert ResidualLayer(3, 4)(x, False).shape == (2, 4, 4, 4)


def test_resnet_gives_the_maps_before_pooling() -> None:
    maps = ResNet(3, 2)(torch.randn(2, 3, 64, 64), False)
    assert [tuple(m.shape[1:]) for m in maps] == [(2, 32, 32), (4, 16, 16), (8, 8, 8), (8, 4, 4)]


def test_initialise_is_xavier_with_zero_biases() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3))
    initialise(model)
    limits = {0: (6 / 30) ** 0.5, 1: (6 / (27 + 36)) ** 0.5, 2: (6 / (27 + 36)) ** 0.5}
    for number, limit in limits.items():
        weight, bias = model[number].weight, model[number].bias
        assert isinstance(weight, nn.Parameter)
        assert isinstance(bias, nn.Parameter)
        assert 0.8 * limit < weight.abs().max() <= limit
        assert bias.abs().max() == 0


def test_gru_cell_by_hand() -> None:
    cell = NormGRUCell(2, 1)
    x, state = torch.randn(3, 2), torch.randn(3, 1)
    gates = torch.cat([x, state], -1) @ cell.gates.weight.T + cell.gates.bias
    normal = (gates - gates.mean(-1, keepdim=True)) / (
        gates.var(-1, unbiased=False, keepdim=True) + 1e-3
    ).sqrt()
    reset, candidate, update = normal.split(1, -1)
    update = (update - 1).sigmoid()
    expected = update * (reset.sigmoid() * candidate).tanh() + (1 - update) * state
    torch.testing.assert_close(cell(x, state), expected)


def test_mlp_has_as_many_hidden_layers_as_told() -> None:
    mlp = MLP(5, 2, units=7, layers=3)
    assert len(mlp.hidden) == 3
    assert mlp(torch.randn(2, 4, 5)).shape == (2, 4, 2)


def test_attention_equals_torch_outside_of_training() -> None:
    ours = CrossAttention(8, 4)
    nn.init.normal_(ours.query_position)
    nn.init.normal_(ours.context_position)
    theirs = nn.MultiheadAttention(8, 4, batch_first=True).eval()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.project.weight,
            "in_proj_bias": ours.project.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x, context = torch.randn(6, 8, 4, 4), torch.randn(2, 8, 4, 4)
    queries = x.flatten(2).transpose(1, 2) + ours.query_position
    tokens = context.repeat_interleave(3, 0).flatten(2).transpose(1, 2) + ours.context_position
    expected = theirs(queries, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(ours(x, context, False), expected)


def test_training_masks_three_quarters_of_the_context() -> None:
    """With the query at zero, attention is the mean of the values kept, so their number can be read off."""
    attention = CrossAttention(4, 4, dropout=0.0)
    initialise(attention)
    for parameter in (attention.project.weight, attention.out.weight):
        nn.init.zeros_(parameter)
    with torch.no_grad():
        attention.project.weight[8:] = torch.eye(4)
        attention.out.weight.copy_(torch.eye(4))
    tokens = torch.zeros(1, 4, 16)
    tokens[0, 0] = 2.0 ** torch.arange(16)
    context = tokens.view(1, 4, 4, 4)
    torch.manual_seed(0)
    out = attention(torch.zeros(50, 4, 4, 4), context, True)[:, 0]
    sums = (out.flatten(1)[:, 0] * 4).round().int().tolist()
    kept = [bin(total).count("1") for total in sums]
    assert kept == [4] * 50
    assert len(set(sums)) > 40
    whole = attention(torch.zeros(1, 4, 4, 4), context, False)[0, 0, 0, 0].item()
    assert whole == pytest.approx((2**16 - 1) / 16)


def test_dropout_only_in_training() -> None:
    attention = CrossAttention(8, 4, mask=0.0, dropout=0.5)
    initialise(attention)
    x, context = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    assert torch.equal(attention(x, context, False), attention(x, context, False))
    assert not torch.equal(attention(x, context, True), attention(x, context, True))


def test_weights_of_another_architecture_are_refused_by_name_and_shape() -> None:
    module, weights = nn.Linear(2, 3), nn.Linear(2, 3).state_dict()
    load_weights(module, weights, "x")
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    remedy = "; run `dvc repro` to make it with the present params.yaml"
    for wrong, named in (
        (nn.Linear(2, 4).state_dict(), "(weight is (4, 2), expected (3, 2))"),
        ({"weight": weights["weight"]}, "(no bias)"),
        ({**weights, "extra": torch.ones(1)}, "(extra is unknown)"),
    ):
        with pytest.raises(UserError) as caught:
            load_weights(module, wrong, "x")
        assert str(caught.value) == f"x: does not fit this architecture {named}{remedy}"
