"""A batch shared by two processes gives the losses, gradients and statistics of the whole batch in one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from prelar.methods import build_model
from prelar.model.spec import ModelSpec
from prelar.utils.distributed import all_gather_rows, dropout, local_rows, sample_global, world

PROCESSES = multiprocessing.get_context("forkserver")
BATCH, TIME = 4, 5
SIZES = {"cnn_depth": 4, "hidden": 12, "deter": 10, "stoch": 4, "discrete": 4, "action_dim": 8}
CASES: dict[str, dict[str, Any]] = {
    "prelar": {"method": "prelar"},
    "prelar, sign": {"method": "prelar", "consistency": "sign", "action_kind": "deterministic"},
    "prelar, discrete": {"method": "prelar", "action_kind": "discrete", "action_window": 3},
    "apv": {"method": "apv"},
    "contextwm": {"method": "contextwm"},
}


def results(case: dict[str, Any]) -> dict[str, Tensor]:
    """Losses, metrics, gradients and buffers after one pass, of the whole batch, in double precision."""
    torch.manual_seed(1)
    model = build_model(ModelSpec(**SIZES, **case)).double().train()
    images = local_rows(torch.rand(BATCH, TIME, 3, 64, 64, dtype=torch.float64) - 0.5)
    is_first = torch.zeros(BATCH, TIME, dtype=torch.bool)
    is_first[:, 0] = is_first[1, 3] = is_first[3, 2] = is_first[3, 4] = True
    torch.manual_seed(2)
    losses, outputs = model.pretrain_losses(images, local_rows(is_first))
    model.total(losses).backward()
    found = {f"loss {name}": value.detach() for name, value in losses.items()}
    found |= {f"metric {name}": value for name, value in outputs["metrics"].items()}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for value in found.values():
        if world() > 1:
            dist.all_reduce(value)
            value /= world()
    return found | dict(model.named_buffers())


def probes() -> dict[str, Tensor]:
    """What the functions themselves give, of the whole batch."""
    torch.manual_seed(3)
    rows = local_rows(torch.arange(8.0).reshape(4, 2))
    drawn = sample_global(lambda shape: torch.rand(shape), (3, len(rows)), 1)
    return {
        "rows": all_gather_rows(rows),
        "drawn": all_gather_rows(drawn.mT).mT,
        "dropped": all_gather_rows(dropout(rows + 1, 0.5)),
    }


def take_part(folder: Path, rank: int, processes: int) -> None:
    """Be one of `processes`; the first leaves what all found."""
    torch.set_num_threads(1)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[assignment,method-assign]
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    found = {name: results(case) for name, case in CASES.items()} | {"probes": probes()}
    if rank == 0:
        torch.save(found, folder / f"{processes}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, Tensor]]]:
    """By the number of processes: results by case."""
    folder = tmp_path_factory.mktemp("shared")
    started = [
        PROCESSES.Process(target=take_part, args=(folder, rank, processes))
        for processes in (1, 2)
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0, 0, 0]
    return {processes: torch.load(folder / f"{processes}.pt") for processes in (1, 2)}


@pytest.mark.parametrize("case", [*CASES, "probes"])
def test_two_processes_find_what_one_does(found: dict[int, dict[str, dict[str, Tensor]]], case: str) -> None:
    alone, together = found[1][case], found[2][case]
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-7, atol=1e-9, msg=name)


def test_a_process_that_is_alone_holds_the_whole_batch() -> None:
    rows = torch.rand(3, 2)
    assert world() == 1 and local_rows(rows) is rows and all_gather_rows(rows) is rows
    torch.manual_seed(0)
    drawn = sample_global(lambda shape: torch.rand(shape), (3, 2))
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3, 2))


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = dropout(torch.ones(200, 200), 0.25)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
