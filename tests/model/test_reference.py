"""Golden parity: the published weights in our model give the published outputs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from prelar.import_reference import convert
from prelar.methods import build_model
from prelar.model.losses import image_loss, kl_loss
from prelar.model.spec import ModelSpec
from tests.model.golden import golden_model, inputs, read_golden, weights

METHODS = ("prelar", "apv", "contextwm")
COMMON = (
    "embed",
    "post_logit",
    "prior_logit",
    "deter",
    "kl_loss",
    "kl",
    "feat",
    "recon",
    "image_loss",
    "embed_train_mode",
)
OUTPUTS = [(method, name) for method in METHODS for name in COMMON] + [
    ("prelar", name) for name in ("action_mean", "action_std", "action_kl")
]


@functools.cache
def computed(method: str) -> dict[str, Tensor]:
    """Our values of every golden output."""
    golden = read_golden(method)
    model = golden_model(method, golden)
    images, is_first = inputs(golden)
    with torch.no_grad():
        seen = model.observe(images, is_first, sample=False)
        feature = model.feature(seen.post)
        recon = model.decode(feature, seen.context)
        loss, kl = kl_loss(seen.post["logit"], seen.prior["logit"])
        found = {
            "embed": seen.embed,
            "post_logit": seen.post["logit"],
            "prior_logit": seen.prior["logit"],
            "deter": seen.post["deter"],
            "kl_loss": loss,
            "kl": kl,
            "feat": feature,
            "recon": recon,
            "image_loss": image_loss(recon, images),
            "embed_train_mode": model.encoder.embed(images, True),
        }
        if seen.stats:
            found |= {f"action_{name}": value for name, value in seen.stats.items()}
            found["action_kl"] = model.action.kind.kl(seen.stats)
    return found


@pytest.mark.parametrize(("method", "name"), OUTPUTS)
def test_output_equals_golden(method: str, name: str) -> None:
    golden = read_golden(method)[f"out/{name}"]
    ours = computed(method)[name]
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max() <= 1e-4 * golden.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_every_golden_output_is_checked(method: str) -> None:
    names = {name.removeprefix("out/") for name in read_golden(method) if name.startswith("out/")}
    assert names == {name for owner, name in OUTPUTS if owner == method}


@pytest.mark.parametrize("method", METHODS)
def test_one_hots_are_exact(method: str) -> None:
    golden = read_golden(method)
    width = int(golden["cfg/stoch"]) * int(golden["cfg/discrete"])
    assert torch.equal(computed(method)["feat"][..., :width], golden["out/feat"][..., :width])


@pytest.mark.parametrize("method", METHODS)
def test_whole_checkpoint_with_wrapper_names(method: str) -> None:
    """A whole published checkpoint prefixes `wm.` and counts batches; both leave nothing unknown."""
    golden = weights(read_golden(method))
    whole = {f"wm.{name}": value for name, value in golden.items()}
    whole["wm.encoder._cnn_net.res0.stack.0.res_block.1.num_batches_tracked"] = torch.tensor(3)
    whole["wm.intr_bonus.queue"] = torch.zeros(2)
    parts, unknown = convert(whole)
    expected, _ = convert(golden)
    assert unknown == ["wm.intr_bonus.queue"]
    assert {part: set(state) for part, state in parts.items()} == {
        part: set(state) for part, state in expected.items()
    }


def test_single_part_has_no_prefix() -> None:
    golden = weights(read_golden("prelar"))
    prefix = "rssm."
    alone = {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}
    parts, unknown = convert(alone, part="dynamics")
    assert not unknown
    assert set(parts) == {"dynamics"}
    assert set(parts["dynamics"]) == set(convert(golden)[0]["dynamics"])


def test_plain_vision_is_renamed_too() -> None:
    model = build_model(ModelSpec(method="dreamerv2", cnn_depth=2, hidden=4, deter=4, stoch=2, discrete=2))
    published = {
        f"encoder._cnn_nn.conv{i}.{kind}": torch.zeros(1) for i in range(4) for kind in ("weight", "bias")
    }
    published |= {
        f"heads.decoder._cnn_nn.conv{i}.{kind}": torch.zeros(1)
        for i in range(4)
        for kind in ("weight", "bias")
    }
    published |= {f"heads.decoder.convin.0.{kind}": torch.zeros(1) for kind in ("weight", "bias")}
    parts, unknown = convert(published)
    assert not unknown
    assert set(parts["encoder"]) == set(model.encoder.state_dict())
    assert set(parts["decoder"]) == set(model.decoder.state_dict())
