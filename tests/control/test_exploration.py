"""The exploration bonus, by hand."""

from __future__ import annotations

import pytest
import torch

from prelar.control.exploration import Bonus, nearest

CPU = torch.device("cpu")


def make(**changes: float) -> Bonus:
    settings = {
        "weight": 1.0,
        "seed": 0,
        "size": 6,
        "window": 3,
        "capacity": 20,
        "neighbours": 2,
        "momentum": 0.9,
    }
    return Bonus(7, device=CPU, **(settings | changes))  # type: ignore[arg-type]


def test_the_nearest_include_the_point_itself() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    torch.testing.assert_close(nearest(points, points, 2), torch.tensor([0.5, 18**0.5 / 2, 0.5]))
    torch.testing.assert_close(nearest(points, points, 3)[0], torch.tensor(2.0))


def test_more_neighbours_than_points_are_the_points() -> None:
    points = torch.tensor([[0.0], [2.0]])
    torch.testing.assert_close(nearest(points, points, 16), torch.tensor([1.0, 1.0]))


def test_it_is_the_distance_of_projected_window_means_over_the_running_magnitude() -> None:
    feature = torch.randn(2, 5, 7)
    bonus = make(weight=0.5)
    got = bonus(feature)
    assert got.shape == (2, 3)
    means = torch.stack([feature[:, i : i + 3].mean(1) for i in range(3)], 1)
    flat = (means @ bonus.projection).flatten(0, 1)
    distance = torch.stack([(flat - x).norm(dim=1).sort().values[:2].mean() for x in flat])
    magnitude = 0.9 + 0.1 * distance.mean()
    torch.testing.assert_close(got.flatten(), 0.5 * distance / magnitude)
    torch.testing.assert_close(bonus.magnitude, magnitude)


def test_the_queue_keeps_the_latest() -> None:
    bonus = make(capacity=8)
    batches = [torch.randn(1, 7, 7) for _ in range(3)]
    for batch in batches:
        bonus(batch)
    windows = torch.cat([(b @ bonus.projection).unfold(1, 3, 1).mean(-1)[0] for b in batches])
    kept = {tuple(row) for row in bonus.queue.tolist()}
    assert kept == {tuple(row) for row in windows[-8:].tolist()}


def test_novelty_earns_more() -> None:
    bonus = make()
    for _ in range(3):
        bonus(0.01 * torch.randn(2, 5, 7))
    seen, new = bonus(torch.cat([torch.zeros(1, 5, 7), 3 * torch.randn(1, 5, 7)]))[:, 0]
    assert new > 0 and seen < new


def test_the_projection_has_the_references_scale() -> None:
    projection = Bonus(3072, weight=1, seed=1, device=CPU).projection
    assert projection.shape == (3072, 128)
    assert projection.std().item() == pytest.approx(1 / 128, rel=0.01)
    torch.testing.assert_close(Bonus(3072, weight=1, seed=1, device=CPU).projection, projection)
    assert not torch.equal(Bonus(3072, weight=1, seed=2, device=CPU).projection, projection)


def test_mixed_precision_changes_nothing() -> None:
    one, two = make(), make()
    feature = torch.randn(2, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = one(feature)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, two(feature))


def test_short_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="need 3 or more"):
        make()(torch.zeros(1, 2, 7))


def test_a_restored_bonus_goes_on_as_the_first() -> None:
    one, two = make(), make()
    one(torch.randn(3, 6, 7))
    two.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    feature = torch.randn(3, 6, 7)
    torch.testing.assert_close(one(feature), two(feature), rtol=0, atol=0)
    assert int(one.state_dict()["count"]) == int(two.state_dict()["count"]) == 24
