"""What is observed; by default everything, as in RLBench."""

from dataclasses import dataclass, field

from pyrep.const import RenderMode

CAMERAS = ("left_shoulder", "right_shoulder", "overhead", "wrist", "front")


@dataclass
class CameraConfig:
    """One camera."""

    rgb: bool = True
    depth: bool = True
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
    joint_positions: bool = True
    joint_forces: bool = True
    gripper_open: bool = True
    gripper_pose: bool = True
    gripper_matrix: bool = False
    gripper_joint_positions: bool = False
    gripper_touch_forces: bool = False
    task_low_dim_state: bool = False
    record_gripper_closing: bool = False

    def set_all(self, value: bool) -> None:
        """Switch everything."""
        for camera in CAMERAS:
            getattr(self, f"{camera}_camera").set_all(value)
        self.joint_velocities = self.joint_positions = self.joint_forces = value
        self.gripper_open = self.gripper_pose = self.gripper_matrix = value
        self.gripper_joint_positions = self.gripper_touch_forces = self.task_low_dim_state = value
