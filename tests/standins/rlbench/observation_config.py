"""What is observed; by default everything, as in RLBench."""

from dataclasses import dataclass, field

from pyrep.const import RenderMode

from rlbench.backend.observation import CAMERAS


class Identity:
    """No noise."""


@dataclass
class CameraConfig:
    """One camera."""

    rgb: bool = True
    rgb_noise: Identity = field(default_factory=Identity)
    depth: bool = True
    depth_noise: Identity = field(default_factory=Identity)
    point_cloud: bool = True
    mask: bool = True
    image_size: tuple[int, int] | list[int] = (128, 128)
    render_mode: RenderMode = RenderMode.OPENGL3
    masks_as_one_channel: bool = True
    depth_in_meters: bool = False

    def set_all(self, value: bool) -> None:
        """Switch all pictures."""
        self.rgb = self.depth = self.point_cloud = self.mask = value


@dataclass
class ObservationConfig:
    """All cameras and vectors."""

    left_shoulder_camera: CameraConfig = field(default_factory=CameraConfig)
    right_shoulder_camera: CameraConfig = field(default_factory=CameraConfig)
    overhead_camera: CameraConfig = field(default_factory=CameraConfig)
    wrist_camera: CameraConfig = field(default_factory=CameraConfig)
    front_camera: CameraConfig = field(default_factory=CameraConfig)
    joint_velocities: bool = True
    joint_velocities_noise: Identity = field(default_factory=Identity)
    joint_positions: bool = True
    joint_positions_noise: Identity = field(default_factory=Identity)
    joint_forces: bool = True
    joint_forces_noise: Identity = field(default_factory=Identity)
    gripper_open: bool = True
    gripper_pose: bool = True
    gripper_matrix: bool = False
    gripper_joint_positions: bool = False
    gripper_touch_forces: bool = False
    wrist_camera_matrix: bool = False
    record_gripper_closing: bool = False
    task_low_dim_state: bool = False

    def set_all(self, value: bool) -> None:
        """Switch everything."""
        self.set_all_high_dim(value)
        self.set_all_low_dim(value)

    def set_all_high_dim(self, value: bool) -> None:
        """Switch all cameras."""
        for camera in CAMERAS:
            getattr(self, f"{camera}_camera").set_all(value)

    def set_all_low_dim(self, value: bool) -> None:
        """Switch all vectors."""
        self.joint_velocities = self.joint_positions = self.joint_forces = value
        self.gripper_open = self.gripper_pose = self.gripper_matrix = value
        self.gripper_joint_positions = self.gripper_touch_forces = value
        self.wrist_camera_matrix = self.task_low_dim_state = value
