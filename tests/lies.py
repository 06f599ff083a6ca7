"""Good inputs of the formats in which data sets come, and lies made of them.

`python -m tests.lies <format> <seed> <count>` reads `count` lies under a limit of memory. Each is read, or
refused by an error that tells a reason; any other end is a traceback that names the lie.
"""

from __future__ import annotations

import io
import pickle
import resource
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from prelar.demos import apv_npz, rlbench_folder
from prelar.utils.errors import UserError
from prelar.videos import archive, labels
from tests import archives

MEMORY = 3 << 30
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 2**64 - 1)


def lie(content: bytes, random: Random) -> bytes:
    """The content with one to four faults: bytes changed, numbers put in, parts cut out or doubled."""
    made = bytearray(content)
    for _ in range(random.randint(1, 4)):
        first, second = sorted(random.randint(0, len(made)) for _ in range(2))
        kind = random.randrange(6)
        if kind == 0:
            made[first : first + 1] = random.randbytes(1)
        elif kind == 1:
            size = 1 << random.randrange(4)
            number = random.choice(NUMBERS) % (1 << 8 * size)
            made[first : first + size] = number.to_bytes(size, random.choice(("little", "big")))
        elif kind == 2:
            del made[first : min(second, first + 40)]
        elif kind == 3:
            made[second:second] = made[first : min(second, first + 400)] * random.randint(1, 50)
        elif kind == 4:
            made[first:first] = b"9" * random.randint(1, 6000)
        else:
            del made[second:]
    return bytes(made)


def tar() -> bytes:
    """An archive's tar, with headers of both kinds."""
    entries = [archives.entry(f"v2/{'n' * length}.webm", b"x" * length) for length in (1, 90, 150, 190)]
    forms = (archives.tarfile.PAX_FORMAT, archives.tarfile.GNU_FORMAT)
    return b"".join(archives.gzip.decompress(archives.tar_gz(entries, form)) for form in forms)


def part() -> bytes:
    """An archive's only part, in a zip."""
    with tempfile.TemporaryDirectory() as folder:
        data = archives.clips_tar({"1": b"one", "2": b"two" * 99})
        return archives.write_parts(Path(folder), data, "zip", 1)[0].read_bytes()


def package() -> bytes:
    """A labels zip."""
    with tempfile.TemporaryDirectory() as folder:
        files = archives.labels_files([str(number) for number in range(12)])
        return archives.labels_zip(Path(folder) / "labels.zip", files).read_bytes()


def train() -> bytes:
    """A file of labels."""
    return archives.labels_files([str(number) for number in range(9)])["train.json"]


def npz() -> bytes:
    """An episode as npz."""
    held = io.BytesIO()
    image = np.zeros((4, 64, 64, 3), np.uint8)
    np.savez_compressed(held, image=image, action=np.ones((4, 3)), gripper_pose=np.ones((4, 8)))
    return held.getvalue()


def low_dim() -> bytes:
    """The pickle of an RLBench episode."""
    made = {}
    for module in ("rlbench", "rlbench.backend", "rlbench.demo", "rlbench.backend.observation"):
        sys.modules[module] = types.ModuleType(module)
    for module, name in (("rlbench.demo", "Demo"), ("rlbench.backend.observation", "Observation")):
        made[name] = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, made[name])
    demo = made["Demo"]()
    demo._observations = []
    for number in range(3):
        step = made["Observation"]()
        step.joint_velocities, step.gripper_pose = np.arange(7) / 10, np.ones(7) * number
        step.gripper_open, step.misc = np.float64(1), {"near": 0.1, "shown": np.eye(2)}
        demo._observations.append(step)
    return pickle.dumps(demo)


def png() -> bytes:
    """A picture."""
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(held, "PNG")
    return held.getvalue()


def read_part(path: Path) -> None:
    """Read an archive of one part."""
    archive.first_piece([path])
    for member in archive.archive_members(archive.find_pieces([path])):
        assert (member.content is None) == (member.reason is not None)


def read_tar(path: Path) -> None:
    """Read a tar."""
    try:
        for member in archive.tar_members(io.BytesIO(path.read_bytes())):
            assert member.id.isprintable() and (member.content is None) == (member.reason is not None)
    except EOFError:
        pass


def read_package(path: Path) -> None:
    """Find and read labels in a zip."""
    labels.seek_labels([path])
    labels.read_labels(path)


def read_train(path: Path) -> None:
    """Read labels in a folder."""
    whole = archives.labels_files([str(number) for number in range(9)])
    for name, content in {**whole, "train.json": path.read_bytes()}.items():
        (path.parent / name).write_bytes(content)
    for identity, label in labels.read_labels(path.parent).clips.items():
        assert identity.isprintable() and (label.label or "").isprintable()


def read_npz(path: Path) -> None:
    """Read an episode as npz."""
    source = apv_npz.open_folder(path.parent)
    (episode,) = map(source.collect, source.jobs())
    assert episode.reason is None or episode.reason.isprintable()


def read_low_dim(path: Path) -> None:
    """Read a pickle as that of an episode, and of its variation."""
    try:
        rlbench_folder.read_variation(path)
    except ValueError:
        rlbench_folder.read_low_dim(path)


def read_png(path: Path) -> None:
    """Read a picture."""
    rlbench_folder.read_pictures(path.parent, 1)


FORMATS: dict[str, tuple[str, Callable[[], bytes], Callable[[Path], None]]] = {
    "tar": ("v2.tar", tar, read_tar),
    "part": ("v2-00.zip", part, read_part),
    "labels package": ("labels.zip", package, read_package),
    "labels": ("labels", train, read_train),
    "npz": ("a-v0-e0-front-4.npz", npz, read_npz),
    "pickle": ("low_dim_obs.pkl", low_dim, read_low_dim),
    "PNG": ("0.png", png, read_png),
}


def main() -> None:
    """Read lies of one format."""
    name, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    file, make, read = FORMATS[name]
    good = make()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        path.write_bytes(good)
        read(path)
        for number in range(count):
            path.write_bytes(lie(good, Random(f"{seed} {number}")))
            try:
                read(path)
            except (UserError, ValueError) as error:
                assert str(error) and (str(error).isprintable() or type(error) is not UserError), number
            except BaseException as error:
                raise AssertionError(f"lie {number} of seed {seed}") from error


if __name__ == "__main__":
    main()
