"""A pre-training step and a fine-tuning update: ours against a plain fp32 eager path, in turn in one run.

The plain path does the same arithmetic as the papers write it: every linear layer of the RSSM at every time
step on concatenated inputs, contiguous images, no compilation, Adam as it comes, losses read at every step.
On a GPU it is timed twice: with cuDNN's TF32, which torch allows by default, and without.
`python -m tests.bench.bench_train SCALE` measures at another scale of params.yaml than `make bench` does,
which takes smoke on a CPU and paper on a GPU. The share of the machine is that of a matrix product's rate.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from prelar import pretrain
from prelar.config import Config, load_config
from prelar.control.actor_critic import ActorCritic
from prelar.control.exploration import Bonus
from prelar.control.learner import Learner, without_parameter_gradients
from prelar.finetune import make_bonus
from prelar.methods import build_model
from prelar.model.images import first_steps, normalise
from prelar.model.losses import gumbel
from prelar.model.rssm import RSSM, State
from prelar.model.spec import ModelSpec
from prelar.model.world_model import WorldModel
from prelar.train.loop import ADAM_EPS, CLIP_NORM, WEIGHT_DECAY, adam, compiles, descend, set_up
from tests.conftest import ROOT

PAIRS = 5
SECONDS = 1.0
ROBOT = 4
KINDS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "_convolution"),
    "batch norm": ("native_batch_norm", "native_batch_norm_backward"),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv"),
    "Adam and gradient norms": ("_fused_adam_", "_foreach_norm", "linalg_vector_norm", "_foreach_mul_"),
    "random numbers": ("exponential_", "uniform_", "normal_", "random_"),
    "nearest neighbours of the bonus": ("_cdist_forward", "topk"),
    "copies": ("copy_", "cat", "_to_copy"),
}
"""Kinds of operations by name, for `shares`; what is in none of them is the rest."""
MATRIX = {"cpu": (1024, torch.float32), "cuda": (8192, torch.bfloat16)}

Step = Callable[[], object]


def run(scale: str | None = None) -> dict[str, float]:
    """All figures by name, at `scale` or the one that suits this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = scale or ("paper" if device == "cuda" else "smoke")
    cfg = load_config(ROOT / "params.yaml").model_copy(update={"scale": scale, "device": device})
    ours = set_up(device=device, precision="bf16" if device == "cuda" else "fp32", threads=cfg.threads)
    plain = Fabric(accelerator=device, devices=1, precision="32-true")
    rate = matrix_rate(device)
    print(f"{scale} on {device}, {cfg.threads} threads; matrix product {rate / 1e12:.3f} TFLOP/s", flush=True)
    print(f"floor: {paper_flops(cfg) / 1e12:.3f} TFLOP a pre-training step of PreLAR at paper size, 16×25")
    figures = {"matrix_tflops": rate / 1e12}
    for name, make, sizes in (
        ("pretrain", pretraining, cfg.pretrain),
        ("update", finetuning, cfg.finetune),
    ):
        step, written = make(cfg, ours, False), make(cfg, plain, True)
        plains = {"plain": exactly(written)} | ({"plain_tf32": written} if device == "cuda" else {})
        found = compare(name, step, plains, device, compiled=compiles("auto", ours))
        if device == "cpu":
            told = (f"{kind} {share:.0%}" for kind, share in shares(step).items())
            print("  " + ", ".join(told), flush=True)
        frames = sizes.batch * sizes.length  # type: ignore[attr-defined]
        figures |= found | {
            f"{name}_frames_per_s": frames / found[f"{name}_ms"] * 1e3,
            f"{name}_flop_share": found[f"{name}_tflop"] * 1e15 / found[f"{name}_ms"] / rate,
        }
    return figures


def compare(
    name: str, ours: Step, plains: dict[str, Step], device: str, *, compiled: bool
) -> dict[str, float]:
    """Milliseconds, the median of the paired ratios, operations and peak memory of ways of one step.

    compiled: whether our way is to be compiled.
    """
    counters.clear()
    for step in (ours, *plains.values()):
        step()
    assert not compiled or counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    figures = {f"{name}_tflop": operations(ours) / 1e12}
    readings = []
    for _ in range(PAIRS):
        readings.append([_milliseconds(step, device) for step in (ours, *plains.values())])
    times = list(zip(*readings, strict=True))
    figures[f"{name}_ms"] = statistics.median(times[0])
    print(f"{name}: {figures[f'{name}_ms']:.1f} ms", flush=True)
    for way, spent in zip(plains, times[1:], strict=True):
        ratios = [slow / fast for fast, slow in zip(times[0], spent, strict=True)]
        figures[f"{name}_{way}_ms"] = statistics.median(spent)
        figures[f"{name}_vs_{way}"] = statistics.median(ratios)
        print(
            f"  {way} {statistics.median(spent):.1f} ms; {statistics.median(ratios):.2f} times as fast "
            f"(from {min(ratios):.2f} to {max(ratios):.2f}, {PAIRS} pairs)",
            flush=True,
        )
    return figures | {f"{name}_peak_mb": _peak(ours, device)}


def operations(step: Step) -> int:
    """Floating-point operations of a step that has run before, counted on code that is not compiled.

    A compiled function whose first call is counted would never be compiled any more.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def exactly(step: Step) -> Step:
    """A step whose convolutions compute in full fp32 on a GPU."""

    def without_tf32() -> object:
        torch.backends.cudnn.allow_tf32 = False
        try:
            return step()
        finally:
            torch.backends.cudnn.allow_tf32 = True

    return without_tf32


def _milliseconds(step: Step, device: str) -> float:
    """Mean time of a step over at least one of them, with the device's work ended."""
    steps, begun = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - begun < SECONDS / 2:
        step()
        steps += 1
        if device == "cuda" and steps % 10 == 0:
            torch.cuda.synchronize()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / steps * 1e3


def _peak(step: Step, device: str) -> float:
    """Peak memory in MB of a step on a GPU; on a CPU that of the process so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


def shares(step: Step) -> dict[str, float]:
    """Where the time of a step on a CPU goes: the share of each of `KINDS` in the time of all operations."""
    times = dict.fromkeys((*KINDS, "the rest"), 0.0)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names), "the rest")
        times[kind] += event.self_cpu_time_total
    return {kind: spent / sum(times.values()) for kind, spent in times.items()}


def matrix_rate(device: str) -> float:
    """Operations a second of a product of two square matrices, the best of several readings."""
    size, kind = MATRIX[device]
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times)


def paper_flops(cfg: Config) -> int:
    """Operations of the paper's pre-training step, counted without doing them."""
    paper = cfg.model_copy(update={"scale": "paper", "method": "prelar"})
    model = pretrain.build(paper).to("meta")
    images = torch.empty(paper.pretrain.batch, paper.pretrain.length, 3, 64, 64, device="meta")
    with FlopCounterMode(display=False) as counter:
        losses, _ = model.pretrain_losses(images, first_steps(*images.shape[:2], images.device))
        model.total(losses).backward()
    return counter.get_total_flops()


# --- The two ways -------------------------------------------------------------------------------------------


def pretraining(cfg: Config, fabric: Fabric, plain: bool) -> Step:
    """A pre-training step on frames that lie on the CPU."""
    model = pretrain.build(cfg.model_copy(update={"method": "prelar"})).train()
    sizes = cfg.pretrain
    frames = torch.randint(256, (sizes.batch, sizes.length, 64, 64, 3), dtype=torch.uint8)
    is_first = first_steps(sizes.batch, sizes.length)
    if plain:
        spell_out(model)
        optimizer = plain_adam(model.parameters())
    else:
        speed_up(model, fabric)
        optimizer = adam(model.parameters(), sizes.lr)
        frames, is_first = (pinned(tensor, fabric) for tensor in (frames, is_first))
    module, wrapped = fabric.setup(model, optimizer)
    module.mark_forward_method("pretrain_losses")

    def ours() -> object:
        images = normalise(frames.to(fabric.device, non_blocking=True))
        with fabric.autocast():
            losses, _ = module.pretrain_losses(images, is_first.to(fabric.device, non_blocking=True))
        return descend(fabric, wrapped, model.total(losses))

    def as_written() -> object:
        losses, _ = module.pretrain_losses(plain_images(frames, fabric), is_first.to(fabric.device))
        plain_descent((optimizer,), model.total(losses))
        return [value.item() for value in losses.values()]

    return as_written if plain else ours


def finetuning(cfg: Config, fabric: Fabric, plain: bool) -> Step:
    """A fine-tuning update of everything that learns."""
    sizes, small = cfg.finetune, cfg.pretrain
    model = build_model(
        ModelSpec(
            stage="finetune",
            method="prelar",
            robot_action_dim=ROBOT,
            units=sizes.units,
            layers=sizes.layers,
            action_dim=cfg.action_dim or cfg.pretrain.action_dim,
            **{name: getattr(small, name) for name in ("cnn_depth", "hidden", "deter", "stoch", "discrete")},
        )
    )
    actor_critic = ActorCritic(
        model.feature_dim,
        ROBOT,
        **{name: getattr(sizes, name) for name in ("units", "layers", "horizon", "discount", "lam")},
        entropy=sizes.entropy,
        slow_every=sizes.slow_every,
    )
    bonus = make_bonus(model, seed=0, device=fabric.device)
    rates: dict[str, Any] = {name: getattr(sizes, name) for name in ("lr", "actor_lr", "critic_lr")}
    shape = (sizes.batch, sizes.length)
    random = np.random.default_rng(0)
    arrays = {
        "image": random.integers(0, 256, (*shape, 64, 64, 3), dtype=np.uint8),
        "action": random.uniform(-1, 1, (*shape, ROBOT)).astype(np.float32),
        "reward": random.uniform(0, 1, shape).astype(np.float32),
        "is_first": first_steps(*shape).numpy(),
    }
    batch = {name: torch.from_numpy(value) for name, value in arrays.items()}
    if plain:
        return plain_update(fabric, model, actor_critic, bonus, batch)
    speed_up(model, fabric)
    learner = Learner(fabric, model, actor_critic, bonus, freeze_updates=0, **rates)
    batch = {name: pinned(value, fabric) for name, value in batch.items()}
    return lambda: learner.update(batch, 1)


def pinned(tensor: Tensor, fabric: Fabric) -> Tensor:
    """A tensor on the CPU, where stages keep batches for a GPU: in memory from which it copies by itself."""
    return tensor.pin_memory() if fabric.device.type == "cuda" else tensor


def speed_up(model: WorldModel, fabric: Fabric) -> None:
    """Compile what the stages compile with `compile: auto`."""
    if compiles("auto", fabric):
        model.compile_training(dynamic=False)


def plain_update(
    fabric: Fabric,
    model: WorldModel,
    actor_critic: ActorCritic,
    bonus: Bonus | None,
    batch: dict[str, Tensor],
) -> Step:
    """A fine-tuning update as the papers write it."""
    spell_out(model)
    model.to(fabric.device).train()
    actor_critic.to(fabric.device)
    published = (*model.groups().values(), actor_critic.actor.parameters(), actor_critic.critic.parameters())
    frozen, rest, actor, critic = (plain_adam(part) for part in published)

    def as_written() -> object:
        data = {name: value.to(fabric.device) for name, value in batch.items()}
        images = plain_images(data["image"], fabric)
        losses, outputs = model.finetune_losses(
            images, data["action"], data["reward"], data["is_first"], bonus=bonus
        )
        model_loss = model.total(losses)
        plain_descent((frozen, rest), model_loss)
        with without_parameter_gradients(model):
            actor_loss, critic_loss, _ = actor_critic.losses(model, model.start(outputs["post"]))
            plain_descent((actor,), actor_loss)
        plain_descent((critic,), critic_loss)
        return [value.item() for value in (*losses.values(), actor_loss, critic_loss)]

    return as_written


def plain_images(frames: Tensor, fabric: Fabric) -> Tensor:
    """Frames uint8 (B, T, 64, 64, 3) as contiguous images."""
    return frames.to(fabric.device).float().permute(0, 1, 4, 2, 3).contiguous() / 255 - 0.5


def plain_descent(optimizers: Sequence[torch.optim.Optimizer], loss: Tensor) -> None:
    """One step, clipped for each optimiser."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP_NORM)
        optimizer.step()


def plain_adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """Adam as torch has it where nothing is asked for."""
    return torch.optim.Adam(parameters, lr=1e-4, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY)


def spell_out(model: WorldModel) -> None:
    """Let a model's RSSM compute every time step by itself, and its weights lie as torch makes them."""
    assert type(model.dynamics) is RSSM
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.dynamics.__class__ = StepwiseRSSM


def one_hot(logit: Tensor, noise: Tensor | None) -> Tensor:
    """As `straight_through`, with torch's one-hot."""
    logit = logit.float()
    chosen = (logit if noise is None else logit + noise).argmax(-1)
    probability = logit.softmax(-1)
    return F.one_hot(chosen, logit.shape[-1]).to(probability.dtype) + (probability - probability.detach())


class StepwiseRSSM(RSSM):
    """The RSSM as the papers write it: one time step after another, each with all of its layers."""

    def observe(
        self, embed: Tensor, action: Tensor, is_first: Tensor, state: State | None = None, sample: bool = True
    ) -> tuple[State, State]:
        """As `RSSM.observe`."""
        state = self.initial(len(embed), embed.device) if state is None else state
        posts: list[State] = []
        priors: list[State] = []
        for step in range(embed.shape[1]):
            keep = 1 - is_first[:, step].float().unsqueeze(-1)
            latent = torch.cat([state["stoch"].flatten(-2) * keep, action[:, step] * keep], -1)
            deter = self.cell(F.elu(self.input(latent)), state["deter"] * keep)
            prior = self.prior(deter)
            logit = self.posterior(torch.cat([deter, embed[:, step]], -1))
            noise = gumbel(tuple(logit.shape), logit.device) if sample else None
            state = {"logit": logit, "stoch": one_hot(logit, noise), "deter": deter}
            posts.append(state)
            priors.append({"logit": prior, "deter": deter})
        return _stack(posts), _stack(priors)


def _stack(states: list[State]) -> State:
    return {key: torch.stack([state[key] for state in states], 1) for key in states[0]}


if __name__ == "__main__":
    for key, value in run(*sys.argv[1:2]).items():
        print(f"{key:<24} {value:12,.3f}")
