"""The embedded sample: an archive in the shape of Something-Something V2, for people without it.

Scripted Meta-World experts act under varied goals, cameras, speeds and widths, and arms move at random; their
clips are encoded and packed exactly as the published archive is:

    20bn-something-something-download-package-labels.zip
        labels/labels.json, train.json, validation.json, test.json, test-answers.csv
    20bn-something-something-v2-00, -01, ...
        one tar.gz of 20bn-something-something-v2/<id>.webm, cut in pieces

The clips are VP9 webm, 240 pixels high, 12 frames a second. The bytes depend on the parameters, the machine
and the versions of the libraries only.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gzip
import io
import itertools
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import ffmpeg
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from prelar.config import SSV2_CLIPS, Config, Sample
from prelar.envs import gl
from prelar.envs.metaworld import ACTION_DIM, MAX_STEPS, Simulator
from prelar.envs.names import check_camera
from prelar.utils.errors import UserError
from prelar.utils.files import STAGING, publish, remove
from prelar.utils.processes import processors, worker_pool
from prelar.utils.video_file import ffmpeg_binary

OUTPUT = Path("data/sample")
NAME = "20bn-something-something-v2"
LABELS = "20bn-something-something-download-package-labels.zip"

HEIGHT = 240
WIDTHS = (427, 320, 426, 352, 240)
FPS = 12
SHORTEST, USEFUL = 8, 25
SHORT_SHARE = 0.125
CAMERAS = ("corner", "corner2", "corner3", "corner4", "topview")
NOISE = 0.15
TAIL = 12
PACE, HELD = 4, 8
ATTEMPTS = 20

# Meta-World task: SSv2-like template and what stands in its brackets.
SCENES: dict[str, tuple[str, tuple[str, ...]]] = {
    "drawer-open": ("Opening [something]", ("a drawer",)),
    "drawer-close": ("Closing [something]", ("a drawer",)),
    "dial-turn": ("Turning [something]", ("a dial",)),
    "button-press-topdown": ("Pressing [something] from above", ("a button",)),
    "door-open": ("Opening [something]", ("a door",)),
    "window-close": ("Closing [something]", ("a window",)),
    "push": ("Pushing [something] across [something]", ("a puck", "a table")),
    "pick-place": ("Lifting [something] off [something]", ("a puck", "a table")),
    "lever-pull": ("Pulling [something] up", ("a lever",)),
    "peg-insert-side": ("Inserting [something] into [something]", ("a peg", "a box")),
    "window-open": ("Opening [something]", ("a window",)),
    "door-close": ("Closing [something]", ("a door",)),
    "faucet-open": ("Turning [something]", ("a tap",)),
    "shelf-place": ("Placing [something] on [something]", ("a cube", "a shelf")),
    "box-close": ("Placing [something] on [something]", ("a lid", "a box")),
    "coffee-pull": ("Pulling [something] towards the edge", ("a mug",)),
    "hammer": ("Hitting [something] with [something]", ("a nail", "a hammer")),
    "basketball": ("Dropping [something] into [something]", ("a ball", "a basket")),
    "sweep": ("Pushing [something] across [something]", ("a cube", "a table")),
    "handle-press": ("Pressing [something] from above", ("a handle",)),
    "reach": ("Moving [something] closer to [something]", ("a gripper", "a ball")),
}
FREE = ("Moving part of [something]", ("a robot",))


@dataclasses.dataclass(frozen=True)
class ClipPlan:
    """What one clip of the sample shows.

    Its `frames` frames are `pace` steps apart, or spread over the expert's episode where that is None. Where
    it is `free`, no expert is at work: the arm moves at random.
    """

    id: str
    split: str
    task: str
    camera: str
    width: int
    frames: int
    seed: int
    episode: int
    pace: int | None = None
    free: bool = False

    @property
    def template(self) -> str:
        """The label with its brackets."""
        return (FREE if self.free else SCENES[self.task])[0]

    @property
    def placeholders(self) -> list[str]:
        """What stands in the brackets."""
        return list((FREE if self.free else SCENES[self.task])[1])

    @property
    def label(self) -> str:
        """The template with its brackets filled in, in lower case as in SSv2."""
        text = self.template.lower()
        for placeholder in self.placeholders:
            text = text.replace("[something]", placeholder, 1)
        return text


def plan(sizes: Sample) -> list[ClipPlan]:
    """What every clip shows, a pure function of the settings. Seven of eight have 25 frames or more.

    Raises `UserError` for a task that has no scene, and for an unknown camera.
    """
    clips, seed = sizes.clips, sizes.seed
    tasks = sizes.tasks or list(SCENES)
    cameras = [check_camera(name) for name in sizes.cameras or CAMERAS]
    for name in tasks:
        if name not in SCENES:
            raise UserError(f"sample.tasks: {name} has no scene; choose of {', '.join(SCENES)}")
    random = np.random.Generator(np.random.PCG64([seed, clips]))
    short = int(clips * SHORT_SHARE)
    lengths = np.concatenate(
        [
            np.linspace(SHORTEST, USEFUL - 1, max(short, 1)).round()[:short],
            (USEFUL + (sizes.longest - USEFUL) * np.linspace(0, 1, clips - short) ** 2).round(),
        ]
    )
    lengths = random.permutation(lengths).astype(int)
    test, validation = max(1, clips // 10), max(1, clips // 6)
    splits = ["test"] * test + ["validation"] * validation + ["train"] * (clips - test - validation)
    order = random.permutation(clips)
    ids = random.choice(np.arange(1, SSV2_CLIPS + 1), size=clips, replace=False)
    free = random.permutation(clips) < round(clips * sizes.free)
    return [
        ClipPlan(
            id=str(ids[number]),
            split=splits[order[number]],
            task=tasks[number % len(tasks)],
            camera=cameras[(number + number // len(tasks)) % len(cameras)],
            width=sizes.width or WIDTHS[int(random.integers(len(WIDTHS)))],
            frames=int(lengths[number]),
            seed=seed,
            episode=number,
            pace=sizes.pace or (PACE if free[number] else None),
            free=bool(free[number]),
        )
        for number in range(clips)
    ]


def play(simulator: Simulator, clip: ClipPlan) -> tuple[int, list[npt.NDArray[np.float64]]]:
    """An episode in which the noisy expert solves the clip's task: its number, and its actions.

    They end shortly after the success, or later where the clip has more frames. Raises `RuntimeError` if the
    expert fails in every attempt.
    """
    for episode in itertools.islice(itertools.count(clip.episode, SSV2_CLIPS), ATTEMPTS):
        random = np.random.Generator(np.random.PCG64([clip.seed, episode]))
        noise = random.normal(scale=NOISE, size=(MAX_STEPS, ACTION_DIM))
        simulator.reset(clip.seed, episode)
        actions: list[npt.NDArray[np.float64]] = []
        solved = MAX_STEPS
        while len(actions) < min(max(solved + TAIL, clip.frames * (clip.pace or 1)), MAX_STEPS):
            actions.append(simulator.expert() + noise[len(actions)])
            if simulator.step(actions[-1]).success:
                solved = min(solved, len(actions))
        if solved < MAX_STEPS:
            return episode, actions
    raise RuntimeError(f"{clip.task}: the expert failed in {ATTEMPTS} episodes from {clip.episode}")


def move_freely(clip: ClipPlan) -> tuple[int, list[npt.NDArray[np.float64]]]:
    """An episode of random actions, each held for some steps: its number, and its actions."""
    random = np.random.Generator(np.random.PCG64([clip.seed, clip.episode]))
    drawn = random.uniform(-1, 1, size=(-(-MAX_STEPS // HELD), ACTION_DIM))
    return clip.episode, list(drawn.repeat(HELD, axis=0)[:MAX_STEPS])


def film(simulator: Simulator, clip: ClipPlan) -> Iterator[npt.NDArray[np.uint8]]:
    """Draw a clip: its frames, uint8 (240, width, 3), whose jagged edges are averaged when it is resized.

    An expert's episode is played once to find where the task is solved, and a second time to draw the frames.
    """
    episode, actions = move_freely(clip) if clip.free else play(simulator, clip)
    last = len(actions) if clip.pace is None else clip.pace * (clip.frames - 1)
    moments = np.linspace(0, min(last, len(actions)), clip.frames).round().astype(int)
    simulator.reset(clip.seed, episode)
    for before, moment in itertools.pairwise([0, *moments.tolist()]):
        for action in actions[before:moment]:
            simulator.step(action)
        yield simulator.draw(clip.camera, clip.width, HEIGHT)


def encode(frames: Iterable[npt.NDArray[np.uint8]], width: int, path: Path) -> None:
    """Encode frames as VP9 webm, the same bytes each time. Raises `RuntimeError` with ffmpeg's words."""
    raw = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{HEIGHT}", r=FPS)
    command = raw.output(
        str(path),
        format="webm",
        vcodec="libvpx-vp9",
        pix_fmt="yuv420p",
        sws_flags="accurate_rnd+bitexact",
        crf=34,
        deadline="realtime",
        threads=1,
        map_metadata=-1,
        **{"b:v": 0, "cpu-used": 6, "row-mt": 0, "fflags": "+bitexact", "flags:v": "+bitexact"},
    )
    command = command.global_args("-v", "error", "-nostdin").overwrite_output()
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(command.compile(ffmpeg_binary()), stdin=subprocess.PIPE, stderr=words)
        assert process.stdin is not None
        try:
            for frame in frames:
                process.stdin.write(frame.data)
            process.stdin.close()
        except BrokenPipeError:
            pass
        except BaseException:
            process.kill()
            raise
        finally:
            status = process.wait()
        words.seek(0)
        if status != 0:
            raise RuntimeError(f"ffmpeg, status {status}: {words.read().decode(errors='replace').strip()}")


def make_clips(clips: Sequence[ClipPlan], folder: Path) -> int:
    """Draw and encode clips of one task as `<folder>/<id>.webm`; how many they are. Runs in a worker."""
    with Simulator(clips[0].task) as simulator:
        for clip in clips:
            encode(film(simulator, clip), clip.width, folder / f"{clip.id}.webm")
    return len(clips)


def write_labels(clips: Sequence[ClipPlan], path: Path) -> None:
    """Write the labels package of SSv2's shape."""
    templates = sorted({template for template, _ in (*SCENES.values(), FREE)})
    numbers = {_plain(template): str(number) for number, template in enumerate(templates)}
    described = {
        split: [
            {"id": clip.id, "label": clip.label, "template": clip.template, "placeholders": clip.placeholders}
            for clip in clips
            if clip.split == split
        ]
        for split in ("train", "validation")
    }
    tested = [clip for clip in clips if clip.split == "test"]
    texts = {
        "labels.json": json.dumps(numbers, indent=0),
        "train.json": json.dumps(described["train"], indent=0),
        "validation.json": json.dumps(described["validation"], indent=0),
        "test.json": json.dumps([{"id": clip.id} for clip in tested], indent=0),
        "test-answers.csv": "".join(f"{clip.id};{_plain(clip.template)}\n" for clip in tested),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            entry = zipfile.ZipInfo(f"labels/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr, entry.create_system = (
                zipfile.ZIP_DEFLATED,
                0o644 << 16,
                3,
            )
            archive.writestr(entry, text)


def _plain(template: str) -> str:
    """A template as it is written in labels.json: without its square brackets."""
    return template.replace("[", "").replace("]", "")


def pack(webms: Sequence[Path], folder: Path, parts: int) -> None:
    """Pack clips as one tar.gz, cut into `parts` pieces of the same size, the last one a little smaller."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.USTAR_FORMAT) as archive,
    ):
        top = tarfile.TarInfo(NAME)
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(top)
        for webm in webms:
            entry = tarfile.TarInfo(f"{NAME}/{webm.name}")
            entry.size, entry.mode = webm.stat().st_size, 0o644
            with webm.open("rb") as content:
                archive.addfile(entry, content)
    whole = packed.getvalue()
    step = -(-len(whole) // parts)
    for part in range(parts):
        (folder / f"{NAME}-{part:02d}").write_bytes(whole[part * step : (part + 1) * step])


def make_sample(folder: Path, planned: Sequence[ClipPlan], *, parts: int, workers: int) -> None:
    """Make the sample of the planned clips in an empty `folder`. The bytes do not depend on `workers`."""
    gl.ensure()
    by_task = [[clip for clip in planned if clip.task == task] for task in SCENES]
    shares = [group[first::workers] for group in by_task for first in range(workers)]
    scratch = folder / ".clips"
    scratch.mkdir(parents=True)
    with (
        worker_pool(workers) as pool,
        tqdm(total=len(planned), desc="sample", unit="clip", disable=None) as progress,
    ):
        jobs = [pool.submit(make_clips, group, scratch) for group in shares if group]
        for job in concurrent.futures.as_completed(jobs):
            progress.update(job.result())
    webms = [scratch / f"{clip.id}.webm" for clip in sorted(planned, key=lambda clip: int(clip.id))]
    pack(webms, folder, parts)
    write_labels(planned, folder / LABELS)
    remove(scratch)


def run(config: Config) -> None:
    """The stage `sample`: make the archive beside, then publish it as data/sample."""
    sizes = config.sample
    staged = STAGING / "sample"
    remove(staged)
    make_sample(staged, plan(sizes), parts=sizes.parts, workers=processors())
    publish(staged, OUTPUT)
    print(f"sample: {sizes.clips} clips in {sizes.parts} parts -> {OUTPUT}", flush=True)
