"""Action modes."""

from rlbench.action_modes.arm_action_modes import ArmActionMode
from rlbench.action_modes.gripper_action_modes import Discrete


class MoveArmThenGripper:
    """Arm first, gripper second."""

    def __init__(self, arm_action_mode: ArmActionMode, gripper_action_mode: Discrete) -> None:
        assert isinstance(arm_action_mode, ArmActionMode) and isinstance(gripper_action_mode, Discrete)
