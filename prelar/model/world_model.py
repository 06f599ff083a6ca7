"""The world model: vision, dynamics, an action part and heads, with one verb per thing it is asked to do.

Shapes: images (B, T, 3, 64, 64) in [-0.5, 0.5]; is_first (B, T), 1 where a clip or an episode begins; action
(B, T, A), action[t] being the one that led to frame t; reward (B, T). Random draws come from torch's global
generator only.

The losses use batch statistics, masking and dropout where `training` is on (`train()`, `eval()`);
everything else uses the running statistics whatever the mode is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prelar.model.actions import ActionPart, Actions, Stats
from prelar.model.layers import load_weights
from prelar.model.losses import categorical_entropy, image_loss, squared_error
from prelar.model.rssm import RSSM, StackedRSSM, State, feature
from prelar.model.spec import ModelSpec
from prelar.model.vision import Context
from prelar.utils.distributed import all_gather_rows
from prelar.utils.errors import UserError

Losses = dict[str, Tensor]
Outputs = dict[str, Any]
Bonus = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Observation:
    """What filtering a sequence yields: states (B, T, …), embedding (B, T, E), context, actions fed."""

    post: State
    prior: State
    embed: Tensor
    context: Context
    action: Tensor
    stats: Stats


class WorldModel(nn.Module):
    """A world model of any method, for pre-training or for fine-tuning; `prelar.methods` puts it together.

    `weights` holds the weight of each loss by name, from the part that has the loss. `frozen` names the
    submodules whose learning rate is 0 in the first updates of fine-tuning. `bonus_source` names what the
    exploration bonus looks at: "embed", "lower" (the action-free feature) or None. `spec` is what the model
    was built from. Weights of convolutions lie channels-last, as frames do, which spares their copies.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        decoder: nn.Module,
        dynamics: RSSM | StackedRSSM,
        action: ActionPart,
        heads: Mapping[str, nn.Module],
        frozen: tuple[str, ...] = (),
        bonus_source: str | None = None,
        spec: ModelSpec,
    ) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.decoder: Any = decoder
        self.dynamics = dynamics
        self.action: Any = action
        self.heads = nn.ModuleDict(heads)
        self.weights = {"image": 1.0} | dynamics.loss_weights(spec) | action.loss_weights(spec)
        self.weights |= dict.fromkeys(heads, 1.0)
        self.frozen = frozen
        self.bonus_source = bonus_source
        self.spec = spec
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # --- Sizes and parts ---

    @property
    def feature_dim(self) -> int:
        """Width of `feature(state)`."""
        return self.dynamics.feature_dim

    @property
    def embed_dim(self) -> int:
        """Width of the embedding of an image."""
        width: int = self.encoder.embed_dim
        return width

    @property
    def bonus_dim(self) -> int:
        """Width of what the exploration bonus looks at; 0 for methods without a bonus."""
        return {"embed": self.embed_dim, "lower": self.feature_dim, None: 0}[self.bonus_source]

    def parts(self) -> dict[str, nn.Module]:
        """The submodules with parameters by name, one checkpoint part each."""
        return {
            name: module for name, module in self.named_children() if any(True for _ in module.parameters())
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state dict of each part."""
        return {name: module.state_dict() for name, module in self.parts().items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what `state()` gave. Raises `UserError` where parts, names or shapes differ."""
        for name in self.parts():
            self.load_part(name, state, name)

    def load_part(self, target: str, state: Mapping[str, Mapping[str, Tensor]], part: str) -> None:
        """Load checkpoint part `part` into the submodule `target`. Raises `UserError` on a misfit."""
        if part not in state:
            raise UserError(f"checkpoint part {part}: missing; run `dvc repro` to make a new checkpoint")
        load_weights(self.get_submodule(target), state[part], f"checkpoint part {part}")

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters for fine-tuning's two groups: `frozen` (encoder, pre-trained dynamics) and `rest`."""
        frozen = [p for name in self.frozen for p in self.get_submodule(name).parameters()]
        known = {id(p) for p in frozen}
        return {"frozen": frozen, "rest": [p for p in self.parameters() if id(p) not in known]}

    def total(self, losses: Losses) -> Tensor:
        """The weighted sum. The names of the losses equal the names of the weights."""
        assert losses.keys() == self.weights.keys(), (sorted(losses), sorted(self.weights))
        return torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()

    def compile_training(self, **options: Any) -> None:
        """Compile what losses and imagination spend their time in, with the options of `torch.compile`.

        Compiled code draws the same random numbers as code that is not.
        """
        from torch._inductor import config as inductor  # takes a second

        inductor.fallback_random = True
        for part in (self.encoder, self.decoder, self.action):
            part.compile(**options)
        observe: Any = torch.compile(self.dynamics.observe, **options)
        self.dynamics.observe = observe  # type: ignore[method-assign]
        imagine_step: Any = torch.compile(self.imagine_step, **options)
        self.imagine_step = imagine_step  # type: ignore[method-assign]

    # --- Losses ---

    def pretrain_losses(self, images: Tensor, is_first: Tensor) -> tuple[Losses, Outputs]:
        """Losses of a batch of video, scalars by name, and outputs without gradient.

        Outputs: `post` (State (B, T, …)), `embed` (B, T, E), `feature` (B, T, F) and `metrics`, scalars by
        name.
        """
        _, losses, outputs = self._losses(images, is_first, None)
        return losses, outputs

    def finetune_losses(
        self,
        images: Tensor,
        action: Tensor,
        reward: Tensor,
        is_first: Tensor,
        bonus: Bonus | None = None,
    ) -> tuple[Losses, Outputs]:
        """Losses of a batch of experience, scalars by name, and outputs as in `pretrain_losses`.

        `bonus` maps the feature it looks at (B, T, bonus_dim), without gradient, to rewards (B, T'), T' ≤
        T. The head `reward` then learns the sum of reward and bonus on the first T' steps, and the head
        `dual_reward`, if there is one, the plain reward on all. Outputs then have `bonus` (B, T') too.
        """
        seen, losses, outputs = self._losses(images, is_first, action)
        seen_feature, target = feature(seen.post), reward.float()
        if bonus is not None:
            extra = bonus(self._bonus_feature(seen).detach().float())
            target = reward[:, : extra.shape[1]].float() + extra
            outputs["bonus"] = extra.detach()
        predicted = self.predict_reward(seen_feature[:, : target.shape[1]])
        losses["reward"] = squared_error(predicted, target)
        if "dual_reward" in self.heads:
            losses["dual_reward"] = squared_error(self.predict_dual_reward(seen_feature), reward)
        outputs["metrics"] |= {
            "reward_mean": target.mean().detach(),
            "predicted_reward_mean": predicted.mean().detach(),
        }
        return losses, outputs

    def _losses(
        self, images: Tensor, is_first: Tensor, action: Tensor | None
    ) -> tuple[Observation, Losses, Outputs]:
        seen = self._observe(images, is_first, action, self.training, sample=True)
        seen_feature = feature(seen.post)
        shown = self._decoded(images.shape[1], images.device)
        decoded = self.decoder(seen_feature[:, shown], seen.context, self.training)
        losses = {"image": image_loss(decoded, images[:, shown])}
        dynamics_losses, kl = self.dynamics.kl(seen.post, seen.prior)
        found = Actions(seen.action, seen.stats)
        losses |= dynamics_losses | self.action.losses(found, seen.post, seen.prior, self.dynamics, is_first)
        metrics = {
            "posterior_entropy": categorical_entropy(seen.post["logit"].detach()).mean(),
            "prior_entropy": categorical_entropy(seen.prior["logit"].detach()).mean(),
            "kl_per_step": kl.mean(),
            "action_size": all_gather_rows(seen.action.detach().square().mean()[None]).mean().sqrt(),
        }
        post = {key: value.detach() for key, value in seen.post.items()}
        outputs = {
            "post": post,
            "embed": seen.embed.detach(),
            "feature": seen_feature.detach(),
            "metrics": metrics,
        }
        return seen, losses, outputs

    def _decoded(self, length: int, device: torch.device) -> Tensor | slice:
        """The steps of a segment whose pictures the image loss compares: the share `decoded`, drawn anew."""
        count = max(1, round(self.spec.decoded * length))
        if count == length:
            return slice(None)
        return torch.rand(length, device=device).argsort()[:count]

    def _bonus_feature(self, seen: Observation) -> Tensor:
        """What the exploration bonus looks at (B, T, bonus_dim)."""
        assert self.bonus_source is not None, "this model has no exploration bonus"
        return seen.embed if self.bonus_source == "embed" else self.dynamics.lower_feature(seen.post)

    # --- Verbs ---

    def encode(self, images: Tensor) -> tuple[Tensor, Context]:
        """images (B, T, 3, 64, 64) -> embedding (B, T, E), and the context that `decode` takes."""
        embed, context = self.encoder(images)
        return embed, context

    def decode(self, feature: Tensor, context: Context) -> Tensor:
        """feature (B, …, F), context of B sequences -> images (B, …, 3, 64, 64)."""
        images: Tensor = self.decoder(feature, context)
        return images

    def feature(self, state: State) -> Tensor:
        """What heads, decoder and policy see of a state: (…, F)."""
        return feature(state)

    def observe(
        self, images: Tensor, is_first: Tensor, action: Tensor | None = None, sample: bool = True
    ) -> Observation:
        """Filter a sequence. `action` holds the robot's actions, for models that take them."""
        return self._observe(images, is_first, action, False, sample)

    def _observe(
        self, images: Tensor, is_first: Tensor, action: Tensor | None, training: bool, sample: bool
    ) -> Observation:
        embed, context = self.encoder(images, training)
        found: Actions = self.action(images, action, is_first, training, sample)
        post, prior = self.dynamics.observe(embed, found.action, is_first, None, sample)
        return Observation(post, prior, embed, context, found.action, found.stats)

    def start(self, post: State) -> State:
        """Posterior states (B, T, …) -> starts of imagination (B·T, …), without gradient."""
        return {key: post[key].detach().flatten(0, 1) for key in ("logit", "stoch", "deter")}

    @torch.no_grad()
    def act_state(
        self, state: State | None, image: Tensor, prev_action: Tensor, is_first: Tensor, sample: bool = True
    ) -> State:
        """Filter one step: image (B, 3, 64, 64), prev_action (B, A), is_first (B,) -> state (B, …)."""
        state = self.dynamics.initial(len(image), image.device) if state is None else state
        embed = self.encoder.embed(image)
        return self.dynamics.obs_step(state, self.action.step(prev_action), embed, is_first, sample)

    def imagine_step(self, state: State, action: Tensor, sample: bool = True) -> State:
        """One step of imagination from state (B, …) under action (B, A), with gradients.

        The action is the robot's in fine-tuning, a latent one in PreLAR's pre-training, and counts for
        nothing in action-free pre-training.
        """
        return self.dynamics.img_step(state, self.action.step(action), sample)

    def predict_reward(self, feature: Tensor) -> Tensor:
        """The reward that the actor maximises, bonus included: (…, F) -> (…)."""
        predicted: Tensor = self.heads["reward"](feature).squeeze(-1)
        return predicted.float()

    def predict_dual_reward(self, feature: Tensor) -> Tensor:
        """The plain reward: (…, F) -> (…). Raises `KeyError` where the model has no head for it."""
        predicted: Tensor = self.heads["dual_reward"](feature).squeeze(-1)
        return predicted.float()

    def predict_plain_reward(self, feature: Tensor) -> Tensor:
        """The task's own reward, by the head that has no bonus in it: (…, F) -> (…)."""
        plain = "dual_reward" in self.heads
        return self.predict_dual_reward(feature) if plain else self.predict_reward(feature)

    @torch.no_grad()
    def open_loop(
        self,
        images: Tensor,
        is_first: Tensor,
        observed: int,
        action: Tensor | None = None,
        sample: bool = False,
    ) -> Tensor:
        """Predict a video: the first `observed` frames from posterior states, the rest from the prior alone.

        The rest is predicted under the actions: the robot's (B, T, A), or latent ones inferred from the true
        frames. The context is taken from the observed frames. Returns (B, T, 3, 64, 64).
        """
        found: Actions = self.action(images, action, is_first, False, sample)
        embed, context = self.encoder(images[:, :observed])
        post, _ = self.dynamics.observe(
            embed, found.action[:, :observed], is_first[:, :observed], None, sample
        )
        features = feature(post)
        if observed < images.shape[1]:
            last = {key: value[:, -1] for key, value in post.items()}
            prior = self.dynamics.imagine(found.action[:, observed:], last, sample)
            features = torch.cat([features, feature(prior)], 1)
        return self.decode(features, context)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, is_first: Tensor, action: Tensor | None = None) -> Tensor:
        """Decode the modes of the posterior states of a sequence: (B, T, 3, 64, 64)."""
        seen = self.observe(images, is_first, action, sample=False)
        return self.decode(feature(seen.post), seen.context)

    @torch.no_grad()
    def infer_actions(self, images: Tensor, is_first: Tensor) -> Tensor | None:
        """The latent action of every pair of frames (B, T-1, A), means or modes; None for methods without."""
        found: Tensor | None = self.action.infer(images, is_first)
        return found
