"""Images of a dataset's frames: found by row in parquet files or by time in videos, and decoded.

A video's image belongs to a frame by the frame's recorded time plus the episode's start in the
file, as in LeRobot: the nearest image in time, at most a quarter of a frame away. Colour is
returned as uint8 RGB, depth as the stored numbers.
"""

import collections
import concurrent.futures
import dataclasses
import io
import itertools
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float
from PIL import Image, ImageOps

from shallow_pi import progress
from shallow_pi.data.lerobot import columns, files, image_files, tables, video, video_times
from shallow_pi.data.lerobot import layout as lerobot_layout

# Encoded images of parquet files kept in memory, per dataset.
MAX_IMAGE_BYTES = 4 * 2**30
# Largest allowed difference between the times of an image and its frame, in frames.
TOLERANCE = 0.25
# Recorded times this close to frame number / fps are rounded to it (LeRobot's tolerance), seconds.
ROUNDING = 1e-4
# Number of videos to check for frame times when a dataset is opened. If there are more, an evenly
# spaced choice and all with frames not at frame number / fps are checked; the rest when read.
MAX_CHECKED = 20_000
_THREADS = 8
# Pillow's modes of one channel above 8 bits.
_DEEP = ("I", "F")
# Names of encodings by their first bytes.
_SUFFIXES = {
    b"\x89PNG": "png",
    b"\xff\xd8": "jpg",
    b"RIFF": "webp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"GIF8": "gif",
    b"BM": "bmp",
}
# Report images after an episode's last frame from this many on.
_UNUSED = 2


@dataclasses.dataclass(frozen=True)
class Unmatched:
    """An episode with frames that no image belongs to."""

    # Seconds from its worst frame to the image nearest to it.
    away: float
    # Names that frame, with the numbers.
    problem: str


@dataclasses.dataclass(frozen=True)
class Doubt:
    """A sign that frames have images of other moments."""

    # Length of the stretch of video.
    seconds: float
    problem: str
    advice: str


def times(
    recorded: Float[np.ndarray, " n"], frames: np.ndarray, fps: float
) -> Float[np.ndarray, " n"]:
    """Recorded times in double precision; float32 is too coarse for long episodes.

    Times that equal frame number / fps up to rounding become exactly that.
    """
    recorded = recorded.astype(np.float64)
    regular = frames / fps
    rounding = np.maximum(ROUNDING, np.spacing(np.abs(recorded).astype(np.float32)))
    return np.where(np.abs(recorded - regular) <= rounding, regular, recorded)


class Images:
    """Decoded images of any camera, from any thread."""

    def __init__(self, layout: lerobot_layout.Layout) -> None:
        self._layout = layout
        self._features: Mapping[str, columns.Feature] = layout.info["features"]
        self._fps = float(layout.info["fps"])
        self._videos = video.Reader()
        self._lock = threading.Lock()
        self._columns = collections.OrderedDict[tuple[str, str], pl.Series]()
        self._depth: dict[str, str] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def is_video(self, camera: str) -> bool:
        """True for a camera in video files, False for one in parquet files."""
        return self._features[camera]["dtype"] == "video"

    def read(self, camera: str, episode: int, row: int, seconds: float) -> np.ndarray:
        """One image: uint8 (h, w, 3), or a depth camera's numbers (h, w, 1).

        Args:
          camera: its key.
          episode: the frame's episode.
          row: of the frame in the episode's data file, for images in parquet.
          seconds: the frame's time since the episode's start, for video.

        Raises:
          FileNotFoundError, ValueError: the image is missing or damaged; names the file.
        """
        if self.is_video(camera):
            file, start = self._layout.video(episode, camera)
            deep = bool(self.depth(camera, episode))
            image = self._videos.frame(
                self._layout.root / file, start + seconds, TOLERANCE / self._fps, deep
            )
            self._compare_size(camera, image)
            return image
        file = self._layout.data_file(episode)
        encoded = self._encoded(file, camera, episode, row)
        try:
            image = self._decode(encoded, camera)
        # Damaged files cause errors of any type in Pillow.
        except Exception as error:
            raise ValueError(
                f"cannot decode it from {self._layout.root / file}: {error}; repair it, or leave "
                "its episode out"
            ) from error
        self._compare_size(camera, image)
        return image

    def encoded(self, camera: str, episode: int, row: int) -> tuple[bytes, str]:
        """An image of a data file in its stored encoding, and a name for it."""
        encoded = self._encoded(self._layout.data_file(episode), camera, episode, row)
        if not isinstance(encoded, bytes):
            image = self._decode(encoded, camera)
            return tables.png(image), f"frame-{row:06d}.png"
        kinds = (kind for magic, kind in _SUFFIXES.items() if encoded.startswith(magic))
        return encoded, f"frame-{row:06d}.{next(kinds, 'png')}"

    def is_beside(self, camera: str, episode: int) -> bool:
        """True if the data file refers to image files instead of containing the images."""
        try:
            value, name = self._stored(self._layout.data_file(episode), camera, 0)
        except (ValueError, FileNotFoundError):
            return False  # Opening the dataset reports the error.
        return value is None and bool(name)

    def depth(self, camera: str, episode: int) -> str:
        """Reason why a camera holds depth or other numbers; empty if it holds images.

        Checks `info.json`, then the episode's first image if it is available.
        """
        with self._lock:
            if camera in self._depth:
                return self._depth[camera]
        found = is_marked_depth(self._features[camera])
        reason = "info.json marks it as a depth map" if found else ""
        if not found and self.is_video(camera):
            path = self._layout.root / self._layout.video(episode, camera)[0]
            if not path.is_file():
                return ""
            pixels = video.pixel_format(path)
            if video.is_deep_grey(pixels):
                reason = f"its video holds one channel above 8 bits ({pixels})"
        elif not found:
            file = self._layout.data_file(episode)
            if not (self._layout.root / file).is_file():
                return ""
            mode = self._mode(file, camera, episode)
            if mode.startswith(_DEEP):
                reason = f"its images have one channel above 8 bits (Pillow's mode {mode})"
        with self._lock:
            self._depth[camera] = reason
        return reason

    def unmatched(
        self,
        spans: Mapping[int, tuple[int, int]],
        seconds: Float[np.ndarray, " n"],
        cameras: Collection[str],
        *,
        missing_ok: bool,
    ) -> dict[int, Unmatched]:
        """Episodes with a frame that no image belongs to.

        Reads the index of each video file once, and decodes nothing.

        Args:
          spans: first row and last row + 1 of each episode in `seconds`.
          seconds: time of each frame since its episode's start.
          cameras: to check; those in parquet files need no times.
          missing_ok: skip missing video files.
        """
        files: dict[tuple[str, str], list[tuple[int, float]]] = {}
        found: dict[int, Unmatched] = {}
        for camera in cameras:
            if self.is_video(camera):
                for episode in spans:
                    try:
                        file, start = self._layout.video(episode, camera)
                    except ValueError as error:
                        found[episode] = Unmatched(np.inf, f"{camera}: {error}")
                        continue
                    files.setdefault((camera, file), []).append((episode, start))
        chosen = list(files)
        if len(files) > MAX_CHECKED:
            sample = set(np.linspace(0, len(files) - 1, MAX_CHECKED).astype(int).tolist())
            odd = {
                episode
                for episode, (first, last) in spans.items()
                if (seconds[first:last] != np.arange(last - first) / self._fps).any()
            }
            chosen = [
                key
                for number, key in enumerate(files)
                if number in sample or odd.intersection(e for e, _ in files[key])
            ]

        doubts: dict[tuple[str, str], list[Doubt]] = {}

        def check(key: tuple[str, str]) -> dict[int, Unmatched]:
            problems, doubtful = self._check_file(*key, files[key], spans, seconds, missing_ok)
            for doubt in doubtful:
                doubts.setdefault((key[0], doubt.advice), []).append(doubt)
            return problems

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for problems in pool.map(check, chosen):
                for episode, problem in problems.items():
                    found.setdefault(episode, problem)
        for (camera, advice), some in doubts.items():
            worst = max(some, key=lambda doubt: doubt.seconds)
            more = f", and {len(some) - 1} more" if len(some) > 1 else ""
            root = self._layout.root
            progress.warn(f"dataset {root}: {worst.problem}{more} of {camera}; {advice}")
        return found

    def _check_file(
        self,
        camera: str,
        file: str,
        episodes: Iterable[tuple[int, float]],
        spans: Mapping[int, tuple[int, int]],
        seconds: Float[np.ndarray, " n"],
        missing_ok: bool,
    ) -> tuple[dict[int, Unmatched], list[Doubt]]:
        path = self._layout.root / file
        if missing_ok and not path.is_file():
            return {}, []
        try:
            shown = video_times.of(str(path))
        except (ValueError, FileNotFoundError) as error:
            return {
                e: Unmatched(np.inf, f"{camera} of episode {e}, frame 0: {error}")
                for e, _ in episodes
            }, []
        problems = {}
        for episode, start in episodes:
            first, last = spans[episode]
            wanted = seconds[first:last] + start
            back = np.flatnonzero(np.diff(wanted) <= 0)
            if len(back):
                i = int(back[0])
                problems[episode] = Unmatched(
                    np.inf,
                    f"{camera} of episode {episode}, frame {i + 1}: recorded at "
                    f"{wanted[i + 1]:.4f} s, the frame before it at {wanted[i]:.4f} s; {len(back)} "
                    "timestamps do not rise, so they cannot tell which image belongs to a frame",
                )
                continue
            there = shown[video_times.nearest(shown, wanted)]
            away = np.nan_to_num(np.abs(there - wanted), nan=np.inf)
            bad = away > TOLERANCE / self._fps
            if bad.any():
                worst = int(np.argmax(away))
                problems[episode] = Unmatched(
                    float(away[worst]),
                    f"{camera} of episode {episode}, frame {worst}: recorded at "
                    f"{wanted[worst]:.4f} s, nearest image at {there[worst]:.4f} s, "
                    f"{away[worst]:.4f} s away, at most {TOLERANCE / self._fps:.4f} allowed "
                    f"({bad.sum()} of {last - first} frames; {file} ends at {shown[-1]:.4f} s)",
                )
        order = sorted((start, episode) for episode, start in episodes)
        return problems, list(self._doubts(file, order, problems, spans, seconds, shown))

    def _doubts(
        self,
        file: str,
        episodes: Sequence[tuple[float, int]],
        problems: Collection[int],
        spans: Mapping[int, tuple[int, int]],
        seconds: Float[np.ndarray, " n"],
        shown: Float[np.ndarray, " n"],
    ) -> Iterator[Doubt]:
        """Images of a file that belong to two episodes, or to none.

        The frames have images, but perhaps those of other moments.
        """
        frame, is_whole = 1 / self._fps, not self._layout.rows
        is_whole |= len(spans) == sum(map(bool, self._layout.lengths.values()))
        for (start, episode), following in itertools.zip_longest(episodes, episodes[1:]):
            if episode in problems:
                continue
            first, last = spans[episode]
            end = start + float(seconds[last - 1]) + frame
            if following:
                until, other = following
            else:
                until, other = (float(shown[-1]) + frame if is_whole else end), episode + 1
            if (shared := end - until) > frame / 2:
                yield Doubt(
                    shared,
                    f"episodes {episode} and {other} share {shared:.1f} s of {file}",
                    "did a tool misplace them when it merged datasets or reset timestamps?",
                )
            # Only the next episode by number tells that nothing else lies between.
            unused = round((until - end) / frame) if other == episode + 1 else 0
            if unused >= _UNUSED and abs(seconds[first]) < frame / 2:
                yield Doubt(
                    unused * frame,
                    f"{unused} images of {file} follow the last frame of episode {episode}",
                    "if frames were cut at the start and renumbered, images lag behind",
                )

    def _encoded(self, file: str, camera: str, episode: int, row: int) -> Any:
        """An image as stored in the parquet file: bytes, or numbers."""
        value, name = self._stored(file, camera, row)
        if value is None and name:
            path = image_files.find(self._layout, camera, episode, file, name)
            try:
                value = path.read_bytes()
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error.strerror}") from error
        if value is None:
            raise ValueError(
                f"{self._layout.root / file} has neither its bytes nor a path: the frame has no "
                "image; leave its episode out"
            )
        return value

    def _stored(self, file: str, camera: str, row: int) -> tuple[Any, str | None]:
        """An image in the parquet file, and the path of a file."""
        value: Any = self._column(file, camera)[row]
        if isinstance(value, dict):
            return value.get("bytes"), value.get("path")
        return (None, value) if isinstance(value, str) else (value, None)

    def _mode(self, file: str, camera: str, episode: int) -> str:
        """Pillow's mode of a file's first image; empty if unknown."""
        try:
            encoded = self._encoded(file, camera, episode, 0)
            with Image.open(io.BytesIO(encoded)) as image:
                return image.mode
        except Exception:  # Reading the image reports the error.
            return ""

    def _decode(self, encoded: object, camera: str) -> np.ndarray:
        if not isinstance(encoded, bytes):
            lists = encoded.to_list() if isinstance(encoded, pl.Series) else encoded
            return _from_numbers(np.array(lists))
        with Image.open(io.BytesIO(encoded)) as opened:
            # As LeRobot does through the `datasets` library.
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(_DEEP):
                return np.asarray(image)[..., None]
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getextrema()[-1] != (255, 255):
                    progress.warn(
                        f"images of {camera} in dataset {self._layout.root} are partly "
                        "transparent; their colours are used as recorded, without transparency"
                    )
            return np.asarray(image.convert("RGB"))

    def _compare_size(self, camera: str, image: np.ndarray) -> None:
        size = image.shape[:2]
        expected = self._sizes.setdefault(camera, declared_size(self._features[camera]) or size)
        if size != expected:
            progress.warn(
                f"images of {camera} in {self._layout.root} differ in size: expected "
                f"{expected[0]} by {expected[1]}, got {size[0]} by {size[1]}; each is resized by "
                "itself"
            )

    def _column(self, file: str, camera: str) -> pl.Series:
        """The images of one data file; recently used files are cached, up to a limit."""
        key = (file, camera)
        with self._lock:
            if key in self._columns:
                self._columns.move_to_end(key)
                return self._columns[key]
        column = files.read_table(self._layout.root / file, [camera])[camera]
        with self._lock:
            self._columns[key] = column
            sizes = {kept: value.estimated_size() for kept, value in self._columns.items()}
            while sum(sizes.values()) > MAX_IMAGE_BYTES and len(sizes) > 1:
                oldest, _ = self._columns.popitem(last=False)
                del sizes[oldest]
        return column


def is_marked_depth(feature: columns.Feature) -> bool:
    """True if `info.json` marks a camera as depth, in any of LeRobot's spellings."""
    places = (feature, feature.get("info"), feature.get("video_info"))
    names = ("is_depth_map", "video.is_depth_map")
    return any(place.get(name) for place in places if isinstance(place, dict) for name in names)


def declared_size(feature: columns.Feature) -> tuple[int, int] | None:
    """Height and width of a camera's images from `info.json`; None if not given."""
    shape, names = feature.get("shape"), feature.get("names")
    if not isinstance(shape, list | tuple) or len(shape) != 3:
        return None
    if isinstance(names, list) and len(names) == 3 and "height" in names and "width" in names:
        return shape[names.index("height")], shape[names.index("width")]
    return (shape[1], shape[2]) if shape[0] in (1, 3, 4) else (shape[0], shape[1])


def _from_numbers(image: np.ndarray) -> np.ndarray:
    """An image stored as nested lists, channels first or last."""
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[-1] not in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or image.dtype.kind not in "iu":
        raise ValueError(f"expected whole numbers (h, w, 3), got {image.dtype} {image.shape}")
    if image.min() < 0 or image.max() > 255:
        raise ValueError(f"expected colours of 0 to 255, got {image.min()} to {image.max()}")
    return np.repeat(image, 3 // image.shape[-1], axis=-1).astype(np.uint8)
