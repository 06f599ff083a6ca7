"""Decoding, ingest and reading, each against its peer and its bound, taken in turn within one run.

decode: the ssv2 flow's own path (tasks, store writing and commits included, two workers) against ffmpeg that
discards its output (the bound) and against a process and a folder of JPEG files per clip (the reference).
own videos: an hour's video, planned and ingested by the flow, against one straight decode of it by ffmpeg
with its own choice of threads. reading: random segments of 25 frames as tensors against the same slices of
one np.memmap (the bound) and against JPEG files read with PIL (the reference). memory: the summed
proportional set size of the flow's processes, the Prefect server apart, for few and for many clips.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zarr
import zarr.codecs
from PIL import Image
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows import runtime, ssv2
from prelar.config import load_config
from prelar.store.remote import publish
from prelar.store.schema import index_path
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.train.sampler import SegmentSampler
from prelar.utils.frames import FRAME
from prelar.videos import ingest
from prelar.videos.decode import SCALE, Decoder
from prelar.videos.labels import Labels, read_labels
from tests import archives, full_size
from tests.bucket import bucket
from tests.conftest import ROOT
from tests.memory import held

REPEATS = 5
CLIPS = 480
DISTINCT = 48
BATCH = 16
LENGTH = 25
SECONDS = 1.0
COLD = 6
FEW, MANY = 500, 5_000
LONG = 1200


def run() -> dict[str, float]:
    """All figures by name."""
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as name:
        folder = Path(name)
        made = make_clips()
        figures = decoding(folder, made)
        figures |= own_videos(folder)
        figures |= reading(folder)
        figures |= tradeoff(folder, made)
        figures |= opening(folder / "full.zarr")
        figures |= memory(folder / "memory")
    return figures


def make_clips() -> dict[str, bytes]:
    """Clips in the manner of Something-Something V2: 240 high, 12 frames a second, 20 to 70 frames."""
    random = np.random.default_rng(0)
    sources = ("testsrc2", "mandelbrot", "testsrc")

    def make(number: int) -> bytes:
        frames, width = int(random.integers(20, 71)), (320, 427, 426, 240)[number % 4]
        return archives.clip(
            frames, width, 240, source=sources[number % 3], filters=f"noise=alls=3:allf=t:all_seed={number}"
        )

    distinct = [make(number) for number in range(DISTINCT)]
    return {str(number): distinct[number % DISTINCT] for number in range(CLIPS)}


def paired(name: str, ours: list[float], theirs: list[float]) -> float:
    """The median of the paired ratios; prints it with its spread."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    middle = statistics.median(ratios)
    print(
        f"{name}: {middle:.2f} (from {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)", flush=True
    )
    return middle


# --- Decoding -----------------------------------------------------------------------------------------------


def decoding(folder: Path, made: dict[str, bytes]) -> dict[str, float]:
    """Frames a second of the flow's way, the bound and the reference's way, in turn."""
    binary = Decoder().path
    files = []
    for identity, content in made.items():
        files.append(folder / f"{identity}.webm")
        files[-1].write_bytes(content)
    source = ingest.folder_source(archives.source(folder / "source", made), None)
    known, decoder = read_labels(source.labels), Decoder()
    rates: dict[str, list[float]] = {"flow": [], "bound": [], "reference": []}
    with runtime.server():
        frames = _flow_seconds(source, folder / "warm", known, decoder)[0]
        for number in range(REPEATS):
            rates["flow"].append(frames / _flow_seconds(source, folder / f"flow-{number}", known, decoder)[1])
            rates["bound"].append(frames / _seconds(lambda: _bound(binary, files, folder)))
            rates["reference"].append(frames / _seconds(lambda: _reference(binary, files, folder / "jpeg")))
            print({name: round(values[-1]) for name, values in rates.items()}, "frames/s", flush=True)
    return {
        "decode_fps": statistics.median(rates["flow"]),
        "decode_bound_fps": statistics.median(rates["bound"]),
        "decode_vs_bound": paired("decode_vs_bound", rates["flow"], rates["bound"]),
        "decode_vs_reference": paired("decode_vs_reference", rates["flow"], rates["reference"]),
    }


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _flow_seconds(source: ingest.Source, folder: Path, known: Labels, decoder: Decoder) -> tuple[int, float]:
    """Frames and seconds of the flow's own filling of a store, inside a running flow."""
    settings = load_config(ROOT / "params.yaml").ssv2.model_copy(update={"workers": 2})

    @flow(name="bench", task_runner=ThreadPoolTaskRunner(max_workers=2))  # type: ignore[arg-type]
    def bench() -> tuple[int, float]:
        with StoreWriter(folder / "ssv2.zarr") as writer:
            seconds = _seconds(lambda: ssv2.fill(writer, source, known, decoder, settings))
            return writer.frames, seconds

    answer = bench()
    shutil.rmtree(folder)
    return answer


def _bound(binary: str, files: list[Path], folder: Path) -> None:
    """Two processes decode and scale half of the clips each, one after the other, and discard the frames."""
    running = []
    for half in range(2):
        listed = folder / f"list-{half}.txt"
        listed.write_text("".join(f"file '{path}'\n" for path in files[half::2]))
        command = [binary, "-v", "error", "-threads", "1", "-f", "concat", "-safe", "0", "-i", str(listed)]
        command += ["-vf", SCALE, "-pix_fmt", "rgb24", "-f", "rawvideo", "-y", os.devnull]
        running.append(subprocess.Popen(command))
    assert [process.wait() for process in running] == [0, 0]


def _reference(binary: str, files: list[Path], folder: Path) -> None:
    """A process per clip, two at a time, each writing JPEG files."""

    def one(path: Path) -> None:
        target = folder / path.stem
        target.mkdir(parents=True)
        command = [binary, "-v", "error", "-i", str(path), "-vf", "scale=64:64", str(target / "%06d.jpg")]
        subprocess.run(command, check=True)

    shutil.rmtree(folder, ignore_errors=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(one, files))


# --- Own videos ---------------------------------------------------------------------------------------------


def own_videos(folder: Path, seconds: int = LONG) -> dict[str, float]:
    """Frames a second of the flow, the planning of clips included, and of one straight decode, in turn."""
    binary, videos = Decoder().path, folder / "videos"
    videos.mkdir()
    picture = ["-f", "lavfi", "-i", f"testsrc2=size=320x240:rate=30:duration={seconds}"]
    codec = ["-c:v", "libx264", "-preset", "ultrafast", "-g", "250", "-pix_fmt", "yuv420p"]
    path = videos / "long.mp4"
    subprocess.run([binary, "-v", "error", *picture, *codec, str(path)], check=True)
    straight = [binary, "-v", "error", "-i", str(path), "-vf", SCALE, "-pix_fmt", "rgb24"]
    straight += ["-fps_mode", "passthrough", "-f", "rawvideo", "-y", os.devnull]
    rates: dict[str, list[float]] = {"flow": [], "straight": []}
    with runtime.server():
        for number in range(REPEATS):
            with contextlib.closing(Decoder(threads=2)) as decoder:
                begun = time.perf_counter()
                source, known = ingest.videos_source(videos, [path], decoder, 5.0)
                planned = time.perf_counter() - begun
                frames, filled = _flow_seconds(source, folder / f"own-{number}", known, decoder)
            assert frames == 30 * seconds
            rates["flow"].append(frames / (planned + filled))
            rates["straight"].append(frames / _seconds(lambda: subprocess.run(straight, check=True)))
            print({name: round(values[-1]) for name, values in rates.items()}, "frames/s", flush=True)
    shutil.rmtree(videos)
    return {
        "own_videos_fps": statistics.median(rates["flow"]),
        "own_videos_vs_straight": paired("own_videos_vs_straight", rates["flow"], rates["straight"]),
    }


# --- Reading ------------------------------------------------------------------------------------------------


def reading(folder: Path, clips: int = 600, length: int = 45) -> dict[str, float]:
    """Segments a second of the sampler, of one np.memmap and of JPEG files, in turn, from the page cache."""
    random = np.random.default_rng(0)
    raw = np.memmap(folder / "frames.raw", np.uint8, "w+", shape=(clips * length, *FRAME))
    jpeg = folder / "pictures"
    begun = time.perf_counter()
    with StoreWriter(folder / "read.zarr") as writer:
        for number in range(clips):
            small = random.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8)
            frames = np.ascontiguousarray(small.repeat(8, axis=1).repeat(8, axis=2))
            writer.append(frames, {"id": str(number), "split": "train"})
            raw[number * length : (number + 1) * length] = frames
            if number < 40:
                (jpeg / str(number)).mkdir(parents=True)
                for t, frame in enumerate(frames):
                    Image.fromarray(frame).save(jpeg / str(number) / f"{t:06d}.jpg", quality=95)
        store = writer.finish({})
    print(f"store of {store.num_frames} frames written in {time.perf_counter() - begun:.1f} s", flush=True)
    sampler = SegmentSampler(store, length=LENGTH, batch=BATCH, seed=0)
    ways = {
        "store": lambda step: sampler.at(step),
        "memmap": lambda step: _slices(raw, sampler, store, step),
        "jpeg": lambda step: _pictures(jpeg, random),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            rates[name].append(_segments_per_second(way))
        print({name: round(values[-1]) for name, values in rates.items()}, "segments/s", flush=True)
    return {
        "segments_per_s": statistics.median(rates["store"]),
        "segments_vs_memmap": paired("segments_vs_memmap", rates["store"], rates["memmap"]),
        "segments_vs_jpeg": paired("segments_vs_jpeg", rates["store"], rates["jpeg"]),
        "store_bytes_per_frame": float(
            sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
        )
        / store.num_frames,
        **remote(folder, store),
    }


def remote(folder: Path, near: Store) -> dict[str, float]:
    """Segments a second from a bucket: without a cache, into an empty one, and out of a full one.

    The S3 server is a Python program here that shares the cores, so what is not warm tells of it, not of a
    link. A full cache and the local store are read in turn.
    """
    given = {"PRELAR_CACHE": str(folder / "cache"), "PRELAR_CACHE_GB": "8"}
    with bucket() as url:
        published = publish(url, Path(near.path), index_path(Path(near.path)))["url"]
        plain = SegmentSampler(Store.open(published), length=LENGTH, batch=BATCH, seed=0)
        ranges = COLD * BATCH / _seconds(lambda: [plain.at(step) for step in range(COLD)])
        with mock.patch.dict(os.environ, given):
            far = Store.open(published)
            cached = SegmentSampler(far, length=LENGTH, batch=BATCH, seed=0)
            cold = COLD * BATCH / _seconds(lambda: [cached.at(step) for step in range(COLD)])
            far.read(0, far.num_frames)
            local = SegmentSampler(near, length=LENGTH, batch=BATCH, seed=0)
            rates: dict[str, list[float]] = {"warm": [], "local": []}
            for _ in range(REPEATS):
                rates["warm"].append(_segments_per_second(cached.at))
                rates["local"].append(_segments_per_second(local.at))
    shutil.rmtree(folder / "cache")
    return {
        "bucket_segments_per_s": ranges,
        "bucket_cold_segments_per_s": cold,
        "bucket_warm_segments_per_s": statistics.median(rates["warm"]),
        "bucket_warm_vs_local": paired("bucket_warm_vs_local", rates["warm"], rates["local"]),
    }


def tradeoff(folder: Path, made: dict[str, bytes]) -> dict[str, float]:
    """Bytes a frame, frames written and segments read a second for chunks and codecs, all by zarr-python.

    The store keeps chunks of 32 frames uncompressed: the table shows what a codec would save, and what it
    costs to read. Its own writer and reader are measured above.
    """
    clips = Decoder().decode(list(made.values())[:DISTINCT])
    frames = np.concatenate([clip.frames for clip in clips if clip.frames is not None])
    codecs: dict[str, Any] = {
        "none": None,
        "zstd": zarr.codecs.ZstdCodec(level=1),
        "blosc-lz4": zarr.codecs.BloscCodec(cname="lz4", clevel=5),
    }
    figures = {}
    print(f"{'chunk':>8} {'codec':>10} {'bytes/frame':>12} {'written/s':>10} {'segments/s':>11}")
    for chunk, (name, codec) in itertools.product((8, 32, 128), codecs.items()):
        path = folder / f"trade-{chunk}-{name}"
        array = zarr.create_array(
            path, shape=frames.shape, dtype="uint8", chunks=(chunk, *FRAME),
            shards=(-(-len(frames) // chunk) * chunk, *FRAME), compressors=codec,
        )  # fmt: skip
        written = len(frames) / _seconds(functools.partial(array.__setitem__, slice(None), frames))
        size = sum(part.stat().st_size for part in path.rglob("*") if part.is_file()) / len(frames)
        begins = np.random.default_rng(0).integers(0, len(frames) - LENGTH, 50)
        read = functools.partial(_read_each, array, begins)
        rate = len(begins) / statistics.median(_seconds(read) for _ in range(REPEATS))
        print(f"{chunk:>8} {name:>10} {size:>12,.0f} {written:>10,.0f} {rate:>11,.0f}", flush=True)
        figures[f"zarr_{chunk}_{name}_bytes_per_frame"] = size
        figures[f"zarr_{chunk}_{name}_segments_per_s"] = rate
        shutil.rmtree(path)
    return figures


def _read_each(array: zarr.Array[Any], begins: np.ndarray) -> None:
    for begin in begins.tolist():
        array[begin : begin + LENGTH]


def _segments_per_second(way: Callable[[int], object]) -> float:
    steps, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        way(steps)
        steps += 1
    return steps * BATCH / (time.perf_counter() - begun)


def _slices(raw: np.memmap, sampler: SegmentSampler, store: Store, step: int) -> np.ndarray:
    clips, starts = sampler.segments(step)
    out = np.empty((BATCH, LENGTH, *FRAME), dtype=np.uint8)
    for row, begin in enumerate((store.clip_start[clips] + starts).tolist()):
        out[row] = raw[begin : begin + LENGTH]
    return out


def _pictures(jpeg: Path, random: np.random.Generator) -> np.ndarray:
    out = np.empty((BATCH, LENGTH, *FRAME), dtype=np.uint8)
    folders = sorted(jpeg.iterdir())
    for row in range(BATCH):
        pictures = sorted(folders[int(random.integers(len(folders)))].iterdir())
        begin = int(random.integers(len(pictures) - LENGTH + 1))
        for t in range(LENGTH):
            out[row, t] = np.asarray(Image.open(pictures[begin + t]))
    return out


def opening(path: Path) -> dict[str, float]:
    """Seconds to open a store with the clips of the whole data set."""
    full_size.build(path)
    return {"store_open_s": min(_seconds(lambda: Store.open(path)) for _ in range(REPEATS))}


# --- Memory -------------------------------------------------------------------------------------------------


def memory(folder: Path) -> dict[str, float]:
    """Peak memory of whole runs of the flow over few and over many small clips, in MB."""
    few, _ = _peak(folder / "few", FEW)
    many, server = _peak(folder / "many", MANY)
    print(
        f"memory: {few:.0f} MB for {FEW} clips, {many:.0f} MB for {MANY}; Prefect's server {server:.0f} MB",
        flush=True,
    )
    return {
        "ingest_peak_rss_mb": many,
        "ingest_peak_rss_few_mb": few,
        "prefect_server_rss_mb": server,
    }


def _peak(folder: Path, clips: int) -> tuple[float, float]:
    """Peak summed PSS in MB of a run's processes, and of its Prefect server."""
    some = [archives.clip(frames, width) for frames in (8, 12, 20, 30) for width in (96, 85)]
    archives.source(folder / "data/sample", {str(number): some[number % 8] for number in range(clips)})
    shutil.copy(ROOT / "params.yaml", folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder / ".prefect")}
    process = subprocess.Popen([sys.executable, "-m", "flows.ssv2"], cwd=folder, env=environment)
    peak = server = 0.0
    while process.poll() is None:
        own, theirs = held(process.pid)
        peak, server = max(peak, own), max(server, theirs)
        time.sleep(0.2)
    assert process.returncode == 0
    shutil.rmtree(folder)
    return peak, server
