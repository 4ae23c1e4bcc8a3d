"""Images a second out of a dataset: PyAV alone, the loader, and the loader from its caches.

All ways read the same images in the same order and take turns. "PyAV" decodes video to RGB and
does nothing else; the loader resizes, transforms and stacks too. CPU time is counted for ways of
one process only: it holds on a busy machine, where rates do not.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import av
import numpy as np

from shallow_pi import flags, progress
from shallow_pi.data import frame_cache, sources
from shallow_pi.data import loader as loaders
from shallow_pi.data.lerobot import hub, images, reader, video_writer
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import pipelines, tokenizer
from shallow_pi.data.robots import robot as robots

HORIZON = 50
PLAIN, TUNED = "PyAV, as it comes", "PyAV, decoders of one thread"
# From a seed to images a second, and to seconds of processor time an image.
_Run = Callable[[int], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The data to read, and how to read it."""

    # LeRobot dataset: a folder or its address on the hub; empty generates a synthetic one.
    path: str = ""
    # Height of the synthetic images in pixels.
    height: int = 256
    # Width of the synthetic images in pixels.
    width: int = 256
    # Codec of the synthetic video.
    codec: Literal["av1", "h264"] = "av1"
    # Distance between key frames of the synthetic video, in frames.
    group: int = 2
    # Frames of the synthetic dataset, in four episodes.
    frames: int = 400
    # Side of the model's images.
    image_size: int = 224
    # Samples per batch.
    batch_size: int = 16
    # Batches to time.
    batches: int = 12
    # Threads that read.
    threads: int = os.cpu_count() or 1
    # Processes to read with instead of threads; 0 does not measure processes.
    workers: int = os.cpu_count() or 1
    # Number of measurements of each method.
    repeats: int = 3
    # Length in milliseconds of the training step to keep up with; 0 compares with none.
    step_ms: float = 0.0

    def __post_init__(self) -> None:
        sizes = "height", "width", "group", "frames", "image_size", "batch_size"
        flags.at_least(self, 1, *sizes, "batches", "threads", "repeats")
        flags.at_least(self, 0, "workers", "step_ms")


def measure(given: Setting, scratch: pathlib.Path) -> dict[str, object]:
    """Measure the images a second of every way: medians of repeats that take turns."""
    dataset = reader.Dataset(hub.locate(given.path) if given.path else _make_up(given, scratch))
    if not dataset.cameras:
        raise ValueError(f"dataset {dataset.path} has no cameras: there are no images to read")
    source = _source(dataset, given.image_size, scratch)
    ways = _ways(given, dataset, source, scratch)
    rates: dict[str, list[float]] = collections.defaultdict(list)
    cpu: dict[str, list[float]] = collections.defaultdict(list)
    with progress.bar("Measure", given.repeats * len(ways)) as advance:
        for repeat in range(given.repeats):
            for way, (run, _) in ways.items():
                rate, seconds = run(repeat)
                rates[way].append(rate)
                cpu[way].append(1e3 * seconds)
                advance(1, note=way)
    rows = {}
    for way, (_, parallel) in ways.items():
        rate = statistics.median(rates[way])
        batch_ms = 1e3 * given.batch_size * len(dataset.cameras) / rate
        rows[way] = {
            "frames_per_second": rate,
            "frames_per_second_per_core": rate / min(parallel, os.cpu_count() or 1),
            # The processor time of worker processes is not counted.
            "cpu_ms": None if "workers" in way else statistics.median(cpu[way]),
            "batch_ms": batch_ms,
            "keeps_up": bool(batch_ms <= given.step_ms) if given.step_ms else None,
            "all": rates[way],
        }
    image = dataset.image(0, dataset.cameras[0])
    return {
        "dataset": given.path or f"made up: {given.codec}, group {given.group}",
        "images": list(image.shape[:2]),
        "cores": os.cpu_count(),
        "arguments": dataclasses.asdict(given),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text, a line for each way, compared with PyAV alone."""
    rows, step_ms = result["rows"], result["arguments"]["step_ms"]
    # Images that are no video are not compared with it.
    tuned = rows.get(TUNED, {}).get("frames_per_second")
    height, width = result["images"]
    lines = [
        f"{result['dataset']}, images of {height} by {width}, {result['cores']} cores",
        f"{'':<34}{'frames/s':>10}{'per core':>10}{'of PyAV':>9}{'cpu ms':>8}{'ms/batch':>10}",
    ]
    for way, row in rows.items():
        keeps = ("keeps up" if row["keeps_up"] else "too slow") if step_ms else ""
        cpu = "" if row["cpu_ms"] is None else f"{row['cpu_ms']:.2f}"
        rate, per_core = row["frames_per_second"], row["frames_per_second_per_core"]
        share = f"{rate / tuned:.0%}" if tuned else ""
        line = f"{way:<34}{rate:>10.0f}{per_core:>10.0f}{share:>9}{cpu:>8}"
        lines.append(f"{line}{row['batch_ms']:>10.1f}  {keeps}".rstrip())
    return "\n".join(lines)


def _ways(
    given: Setting, dataset: reader.Dataset, source: sources.DatasetSource, scratch: pathlib.Path
) -> dict[str, tuple[_Run, int]]:
    """Every way by name: a function that measures it, and its number of threads or processes."""
    cameras, samples = list(dataset.cameras), given.batch_size * given.batches
    cached = sources.Cached(source, max_bytes=8 * 2**30)
    on_disk = sources.DatasetSource(
        dataset,
        source.robot,
        HORIZON,
        source.transform,
        frame_cache.FrameCache(dataset, cameras, given.image_size, scratch / "cache").image,
    )

    def pyav(tuned: bool) -> _Run:
        return lambda seed: _pyav(dataset, _order(source, samples, seed), given.threads, tuned)

    def load(read: sources.Source, workers: int, warm: bool = False) -> _Run:
        def run(seed: int) -> tuple[float, float]:
            if warm:
                for i in range(len(read)):
                    read[i]
            with contextlib.closing(
                loaders.Loader(
                    read,
                    given.batch_size,
                    seed=seed,
                    num_threads=given.threads,
                    num_workers=workers,
                )
            ) as batches:
                # Wait for a steady stream: workers start, and batches read ahead are used up.
                for _ in range(1 + (2 * workers or 4)):
                    next(batches)
                timer = _Timer(samples * len(cameras))
                for _ in range(given.batches):
                    next(batches)
                return timer.stop()

        return run

    t, w = given.threads, given.workers
    ways: dict[str, tuple[_Run, int]] = {}
    if all(dataset.features[camera]["dtype"] == "video" for camera in cameras):
        ways |= {PLAIN: (pyav(False), t), TUNED: (pyav(True), t)}
    ways[f"loader, {t} threads"] = (load(source, 0), t)
    if w:
        ways[f"loader, {w} workers"] = (load(source, w), w)
    ways[f"second epoch, memory, {t} threads"] = (load(cached, 0, warm=True), t)
    ways[f"second epoch, disk, {t} threads"] = (load(on_disk, 0, warm=True), t)
    if w:
        ways[f"second epoch, disk, {w} workers"] = (load(on_disk, w, warm=True), w)
    return ways


def _order(source: sources.Source, samples: int, seed: int) -> list[int]:
    order = loaders.order(sources.shares(source), seed)
    return [order[k] for k in range(samples)]


class _Timer:
    """A timer that starts at once; `stop` gives images a second and CPU seconds an image."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        cpu = time.process_time() - self.cpu_began
        return self.count / (time.perf_counter() - self.began), cpu / self.count


def _pyav(
    dataset: reader.Dataset, order: list[int], threads: int, tuned: bool
) -> tuple[float, float]:
    """Decode the images of `order` to RGB with PyAV alone."""
    local = threading.local()

    def decode(i: int) -> None:
        episode = int(dataset.columns["episode_index"][i])
        for camera in dataset.cameras:
            file, start = dataset.layout.video(episode, camera)
            seconds = start + dataset.seconds[i]
            tolerance = images.TOLERANCE / dataset.fps
            videos = local.__dict__.setdefault("videos", {})
            if file not in videos:
                container = av.open(os.fspath(dataset.path / file))
                stream = container.streams.video[0]
                stream.thread_type = "NONE"
                if tuned:
                    stream.codec_context.thread_count = 1
                videos[file] = container, stream
            container, stream = videos[file]
            target = seconds + tolerance if tuned else max(0.0, seconds - tolerance)
            container.seek(round(target / stream.time_base), stream=stream, backward=True)
            for image in container.decode(stream):
                if abs(float(image.time) - seconds) <= tolerance:
                    image.to_ndarray(format="rgb24")
                    break

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, order[:threads]))  # Open the files.
        timer = _Timer(len(order) * len(dataset.cameras))
        list(pool.map(decode, order))
        return timer.stop()


def _source(
    dataset: reader.Dataset, image_size: int, scratch: pathlib.Path
) -> sources.DatasetSource:
    """The samples of a dataset as a run transforms them, whatever robot made them."""
    state = dataset.columns[lerobot_writer.STATE_KEY].shape[1]
    action = dataset.columns[lerobot_writer.ACTION_KEY].shape[1]
    cameras = {camera: camera for camera in dataset.cameras}
    robot = robots.Robot("any", cameras, state, action, fps=dataset.fps)
    tokenizer.train(dataset.tasks.values(), scratch / "tokenizer.model")
    transform = pipelines.inputs(
        robot,
        cameras=dataset.cameras,
        image_size=image_size,
        action_dim=max(32, state, action),
        tokenizer=tokenizer.Tokenizer(scratch / "tokenizer.model", 48),
        stats=sources.norm_stats([dataset], robot, HORIZON),
        kind="z_score",
    )
    return sources.DatasetSource(dataset, robot, HORIZON, transform)


def _make_up(given: Setting, scratch: pathlib.Path) -> pathlib.Path:
    """Write a dataset: a moving scene with a little noise, seen by two cameras."""
    generator = np.random.default_rng(0)
    shape = (-(-given.height // 8), -(-given.width // 8), 3)
    scene = generator.integers(0, 256, shape, np.uint8).repeat(8, 0).repeat(8, 1)
    scene = scene[: given.height, : given.width] // 2 + 60
    episodes = np.array_split(np.arange(given.frames), min(4, given.frames))
    encoding = video_writer.Encoding(given.codec, given.group)

    def film(frames: np.ndarray, camera: int) -> Iterator[np.ndarray]:
        for t in frames:
            noise = generator.integers(0, 8, scene.shape, np.uint8)
            yield np.roll(scene, (3 * t + 40 * camera, 5 * t), (0, 1)) + noise

    with (
        lerobot_writer.Writer(scratch / "dataset", 20, encoding=encoding) as writer,
        progress.bar("Make up video", len(episodes)) as advance,
    ):
        for frames in episodes:
            films = {f"camera{c}": np.stack(list(film(frames, c))) for c in range(2)}
            state, action = generator.normal(size=(2, len(frames), 7))
            writer.add_episode(films, state, action, "do something")
            advance(1)
    return scratch / "dataset"
