"""Gripper action modes."""


class Discrete:
    """Open or closed."""

    def __init__(self, attach_grasped_objects: bool = True, detach_before_open: bool = True) -> None:
        assert attach_grasped_objects and detach_before_open
