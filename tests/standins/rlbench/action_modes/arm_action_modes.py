"""Arm action modes."""


class JointVelocity:
    """Velocities of the joints."""
