"""What the steps of a live demo become: each action leads from its frame to the next."""

from types import SimpleNamespace

import numpy as np
import pytest

from prelar.demos.rlbench_folder import FPS
from prelar.demos.rlbench_worker import demo_arrays


@pytest.mark.parametrize("mode", ["joint_velocity", "joint_position", "gripper_pose"])
def test_actions_lead_from_each_frame_to_the_next(mode: str) -> None:
    """Steps as a simulator makes them: it moves with the velocities that it then tells."""
    random = np.random.default_rng(0)
    velocities = np.cumsum(random.normal(size=(30, 7)), axis=0)
    positions = np.cumsum(velocities / FPS, axis=0)
    opening = random.integers(0, 2, 30).astype(np.float64)
    steps = [
        SimpleNamespace(
            front_rgb=np.zeros((64, 64, 3), np.uint8),
            joint_velocities=velocities[number],
            joint_positions=positions[number],
            gripper_pose=2 * positions[number],
            gripper_open=opening[number],
        )
        for number in range(30)
    ]
    found = demo_arrays(steps, ["front"], mode)
    actions = found["actions"][:-1, :7]
    wanted = found["gripper"][1:, :7] if mode == "gripper_pose" else positions[1:]
    reached = positions[:-1] + actions / FPS if mode == "joint_velocity" else actions
    assert np.allclose(reached, wanted, atol=1e-4)
    assert np.array_equal(found["actions"][:-1, 7], opening[1:]) and not found["actions"][-1].any()
