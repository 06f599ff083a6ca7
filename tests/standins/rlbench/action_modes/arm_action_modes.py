"""Arm action modes."""


class ArmActionMode:
    """What an action does with the arm."""


class JointVelocity(ArmActionMode):
    """Velocities of the joints."""


class JointPosition(ArmActionMode):
    """Positions of the joints."""

    def __init__(self, absolute_mode: bool = True) -> None:
        assert absolute_mode


class EndEffectorPoseViaPlanning(ArmActionMode):
    """Poses of the gripper, to which a path is planned."""

    def __init__(
        self, absolute_mode: bool = True, frame: object = None, collision_checking: bool = False
    ) -> None:
        assert absolute_mode and not collision_checking
