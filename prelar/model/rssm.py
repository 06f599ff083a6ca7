"""Recurrent state-space models: one RSSM, and an action-conditional one stacked on an action-free one.

A state is a flat dict of tensors: `logit` (…, S, K), `stoch` (…, S, K) one-hot with straight-through
gradient, and `deter` (…, D). `action[t]` is the action that led to frame t. Where `is_first` is 1, the
previous state and the action are zeroed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prelar.model.layers import NormGRUCell
from prelar.model.losses import gumbel, kl_loss, straight_through
from prelar.model.spec import ModelSpec
from prelar.utils.distributed import sample_global

State = dict[str, Tensor]


def feature(state: State) -> Tensor:
    """What heads, decoder and policy see: the flattened one-hots, then `deter`: (…, S·K + D)."""
    return torch.cat([state["stoch"].flatten(-2), state["deter"]], -1)


def _compute(x: Tensor) -> Tensor:
    """`x` in the type that autocast computes with, cast once instead of at every time step."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if on else x


class Head(nn.Module):
    """linear, ELU, linear to the logits of `stoch` categoricals with `discrete` classes."""

    def __init__(self, inputs: int, hidden: int, stoch: int, discrete: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, stoch * discrete)
        self.shape = (stoch, discrete)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden values before their ELU (…, hidden) -> logits (…, S, K), in float32."""
        out: Tensor = self.out(F.elu(x)).float()
        return out.unflatten(-1, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> logits (…, S, K), in float32."""
        return self.logits(self.hidden(x))


class RSSM(nn.Module):
    """Recurrent state-space model with categorical latents (DreamerV2, equation 1).

    The input of each step is a linear layer of the one-hots and the action, of which the action's half,
    like the embedding's half of the posterior and the whole prior, is computed for all time steps at once.
    """

    def __init__(
        self, *, embed_dim: int, action_dim: int, hidden: int, deter: int, stoch: int, discrete: int
    ) -> None:
        super().__init__()
        self.stoch, self.discrete, self.deter = stoch, discrete, deter
        self.feature_dim = stoch * discrete + deter
        self.input = nn.Linear(stoch * discrete + action_dim, hidden)
        self.cell = NormGRUCell(hidden, deter)
        self.prior = Head(deter, hidden, stoch, discrete)
        self.posterior = Head(deter + embed_dim, hidden, stoch, discrete)

    def initial(self, batch: int, device: torch.device) -> State:
        """The zero state (batch, …)."""
        latent = torch.zeros(batch, self.stoch, self.discrete, device=device)
        return {"logit": latent, "stoch": latent, "deter": torch.zeros(batch, self.deter, device=device)}

    def _noise(self, *batch: int, like: Tensor, sample: bool) -> Tensor | None:
        """Noise that makes modes samples (*batch, S, K), the last of `batch` being the rows of the batch."""
        if not sample:
            return None
        shape = (*batch, self.stoch, self.discrete)
        return sample_global(lambda whole: gumbel(whole, like.device), shape, len(batch) - 1)

    def filter(
        self, embed: Tensor, action: Tensor, is_first: Tensor, state: State | None = None, sample: bool = True
    ) -> State:
        """Filter embed (B, T, E) under action (B, T, A), is_first (B, T) -> the posterior (B, T, …).

        `state` (B, …) precedes the first step (zeros by default). `sample=False` takes modes.
        """
        batch, time = embed.shape[:2]
        state = self.initial(batch, embed.device) if state is None else state
        keep = 1 - is_first.float().unsqueeze(-1)
        width = self.stoch * self.discrete
        weights = self.input.weight, self.posterior.hidden.weight
        latent_weight, deter_weight = _compute(weights[0][:, :width]), _compute(weights[1][:, : self.deter])
        from_action = F.linear(action * keep, weights[0][:, width:], self.input.bias).unbind(1)
        from_embed = F.linear(embed, weights[1][:, self.deter :], self.posterior.hidden.bias).unbind(1)
        noise = self._noise(time, batch, like=embed, sample=sample)
        stoch, deter = state["stoch"], state["deter"]
        logits, stochs, deters = [], [], []
        for step, kept in enumerate(keep.unbind(1)):
            latent = F.linear(stoch.flatten(-2) * kept, latent_weight)
            deter = self.cell(F.elu(latent + from_action[step]), deter * kept)
            logit = self.posterior.logits(F.linear(deter, deter_weight) + from_embed[step])
            stoch = straight_through(logit, None if noise is None else noise[step])
            logits.append(logit)
            stochs.append(stoch)
            deters.append(deter)
        return {
            "logit": torch.stack(logits, 1),
            "stoch": torch.stack(stochs, 1),
            "deter": torch.stack(deters, 1),
        }

    def observe(
        self, embed: Tensor, action: Tensor, is_first: Tensor, state: State | None = None, sample: bool = True
    ) -> tuple[State, State]:
        """As `filter`, but the posterior and the prior (B, T, …).

        The prior has no `stoch`: nothing is drawn from it.
        """
        post = self.filter(embed, action, is_first, state, sample)
        return post, {"logit": self.prior(post["deter"]), "deter": post["deter"]}

    def obs_step(
        self, state: State, action: Tensor, embed: Tensor, is_first: Tensor, sample: bool = True
    ) -> State:
        """Filter one step: state (B, …), action (B, A), embed (B, E), is_first (B,) -> posterior (B, …)."""
        post = self.filter(embed[:, None], action[:, None], is_first[:, None], state, sample)
        return {key: value[:, 0] for key, value in post.items()}

    def img_step(self, state: State, action: Tensor, sample: bool = True) -> State:
        """One step of imagination: state (B, …), action (B, A) -> the prior with a drawn `stoch` (B, …)."""
        latent = state["stoch"].flatten(-2)
        deter = self.cell(F.elu(self.input(torch.cat([latent, action.to(latent.dtype)], -1))), state["deter"])
        logit = self.prior(deter)
        noise = self._noise(len(logit), like=logit, sample=sample)
        return {"logit": logit, "stoch": straight_through(logit, noise), "deter": deter}

    def imagine(self, actions: Tensor, state: State, sample: bool = True) -> State:
        """Roll the prior from state (B, …) under actions (B, H, A) -> states (B, H, …)."""
        states = []
        for action in actions.unbind(1):
            state = self.img_step(state, action, sample)
            states.append(state)
        return {key: torch.stack([one[key] for one in states], 1) for key in states[0]}

    def loss_weights(self, spec: ModelSpec) -> dict[str, float]:
        """The weight of each loss of `kl` by name."""
        return {"kl": spec.beta}

    def kl(self, post: State, prior: State) -> tuple[dict[str, Tensor], Tensor]:
        """The KL losses by name, and the KL per step (B, T) without gradient."""
        loss, value = kl_loss(post["logit"], prior["logit"])
        return {"kl": loss}, value

    def lower_feature(self, post: State) -> Tensor:
        """The feature that needs no action: of a single RSSM its only one (…, F)."""
        return feature(post)


class StackedRSSM(nn.Module):
    """An action-conditional RSSM whose embedding is the feature of an action-free one (APV).

    It answers the calls of an `RSSM`. A state has the upper RSSM's entries under their usual names and the
    lower one's as `lower_logit`, `lower_stoch` and `lower_deter`. Imagination needs, and returns, the upper
    ones only. The action has the slot's width for both; the lower RSSM is fed zeros.
    """

    def __init__(self, lower: RSSM, upper: RSSM) -> None:
        super().__init__()
        self.lower, self.upper = lower, upper
        self.feature_dim = upper.feature_dim

    @staticmethod
    def _join(lower: State, upper: State) -> State:
        return upper | {f"lower_{key}": value for key, value in lower.items()}

    @staticmethod
    def _split(state: State) -> tuple[State, State]:
        lower = {k.removeprefix("lower_"): v for k, v in state.items() if k.startswith("lower_")}
        return lower, {k: v for k, v in state.items() if not k.startswith("lower_")}

    def initial(self, batch: int, device: torch.device) -> State:
        """The zero state of both (batch, …)."""
        return self._join(self.lower.initial(batch, device), self.upper.initial(batch, device))

    def observe(
        self, embed: Tensor, action: Tensor, is_first: Tensor, state: State | None = None, sample: bool = True
    ) -> tuple[State, State]:
        """As `RSSM.observe`, for both."""
        lower, upper = (None, None) if state is None else self._split(state)
        low_post, low_prior = self.lower.observe(embed, torch.zeros_like(action), is_first, lower, sample)
        post, prior = self.upper.observe(feature(low_post), action, is_first, upper, sample)
        return self._join(low_post, post), self._join(low_prior, prior)

    def obs_step(
        self, state: State, action: Tensor, embed: Tensor, is_first: Tensor, sample: bool = True
    ) -> State:
        """As `RSSM.obs_step`, for both."""
        lower, upper = self._split(state)
        low_post = self.lower.obs_step(lower, torch.zeros_like(action), embed, is_first, sample)
        return self._join(low_post, self.upper.obs_step(upper, action, feature(low_post), is_first, sample))

    def img_step(self, state: State, action: Tensor, sample: bool = True) -> State:
        """As `RSSM.img_step`, for the upper one."""
        return self.upper.img_step(state, action, sample)

    def imagine(self, actions: Tensor, state: State, sample: bool = True) -> State:
        """As `RSSM.imagine`, for the upper one."""
        return self.upper.imagine(actions, state, sample)

    def loss_weights(self, spec: ModelSpec) -> dict[str, float]:
        """The weight of each loss of `kl` by name: the action-free RSSM only learns through the upper one."""
        return {"kl": spec.beta, "lower_kl": 0.0}

    def kl(self, post: State, prior: State) -> tuple[dict[str, Tensor], Tensor]:
        """The KL losses of both by name, and the upper one's KL per step (B, T) without gradient."""
        losses, value = self.upper.kl(post, prior)
        lower, _ = kl_loss(post["lower_logit"], prior["lower_logit"])
        return losses | {"lower_kl": lower}, value

    def lower_feature(self, post: State) -> Tensor:
        """The action-free RSSM's feature (…, F)."""
        return feature({"stoch": post["lower_stoch"], "deter": post["lower_deter"]})
