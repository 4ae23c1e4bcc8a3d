"""Convert a LeRobot dataset (v2.0, v2.1, v3.0) to v3.0, and its images to a faster encoding.

uv run scripts/convert_dataset.py SOURCE TARGET [--images copy|png|av1|h264] [--cameras KEY ...]

    ~/data/old ~/data/new                      v2.x → v3.0; images are copied bit for bit
    ~/data/old ~/data/new --images h264        re-encoded for random access

SOURCE is a folder or an address on the Hugging Face hub; TARGET must not exist, and appears only
when complete.

Random frames of a video with distant key frames (H.264 often has one in 250) decode at a tenth of
the speed; av1 and h264 write a key frame every second image (--group). Both are lossy, png is not.
Depth is always copied. --cameras keeps the cameras it names alone; videos of others are not fetched
from the hub. Timestamps, text and other columns are kept, and anything that cannot be kept is
reported. Statistics of numbers are exact; those of copied images come from up to twenty frames per
episode.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from shallow_pi import flags, suggestions
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.data.lerobot import convert, hub, layout, reader, video_writer


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The dataset to convert, and its new format."""

    # The dataset: a folder, or owner/name[@revision] on the hub.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    # The folder to create.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    # Copy videos and images unchanged, or re-encode all of them.
    images: Literal["copy", "png", "av1", "h264"] = "copy"
    # av1 and h264: distance between key frames, in images.
    group: int = 2
    # av1 and h264: constant rate factor; smaller means better quality and larger files.
    crf: int = 30
    # Cameras to keep, such as observation.images.top; empty keeps all.
    cameras: tuple[str, ...] = ()
    # Leave out unreadable episodes, and report their number.
    skip_bad_episodes: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, convert, print the folder."""
    given = flags.parse(Arguments, arguments, __doc__ or "", idle=_idle)
    with exits.exit_on():
        run_folder.check_output(given.target, "give another TARGET", is_new=True)
        cameras = given.cameras or None
        meta = layout.read(hub.locate(given.source, cameras=cameras))
        _check_cameras(given.cameras, meta)
        source = reader.Dataset(
            meta,
            keys=(),
            cameras=cameras,
            skip_bad_episodes=given.skip_bad_episodes,
            skip_flag="--skip-bad-episodes",
        )
        images: Literal["copy", "png"] | video_writer.Encoding
        if given.images == "copy" or given.images == "png":
            images = given.images
        else:
            images = video_writer.Encoding(given.images, given.group, given.crf)
        print(convert.convert(source, given.target, images))


def _check_cameras(wanted: Sequence[str], meta: layout.Layout) -> None:
    for key in wanted:
        if key not in meta.cameras:
            raise ValueError(
                f"--cameras {key}: the cameras of {meta.root} are "
                f"{', '.join(meta.cameras) or 'none'}{suggestions.closest(key, meta.cameras)}"
            )


def _idle(given: Arguments) -> flags.Idle:
    reason = f"--images {given.images} encodes no video; give --images av1 or h264"
    yield given.images in ("copy", "png"), "group crf", reason
