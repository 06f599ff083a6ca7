"""What is seen and felt at one step."""

from typing import Any

CAMERAS = ("left_shoulder", "right_shoulder", "overhead", "wrist", "front")
VECTORS = (
    "joint_velocities",
    "joint_positions",
    "joint_forces",
    "gripper_open",
    "gripper_pose",
    "gripper_matrix",
    "gripper_joint_positions",
    "gripper_touch_forces",
    "task_low_dim_state",
)


class Observation:
    """One step; what was not asked for is None."""

    def __init__(self, misc: dict[str, Any], **seen: Any) -> None:
        pictures = [
            f"{camera}_{kind}" for camera in CAMERAS for kind in ("rgb", "depth", "mask", "point_cloud")
        ]
        assert seen.keys() <= {*pictures, *VECTORS}
        self.__dict__ |= {**dict.fromkeys([*pictures, *VECTORS]), **seen, "misc": misc}
