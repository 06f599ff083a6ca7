"""Gripper action modes."""


class Discrete:
    """Open or closed."""
