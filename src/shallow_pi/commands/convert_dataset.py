"""Convert a LeRobot dataset (v2.0, v2.1, v3.0) to v3.0, and its pictures to a faster encoding.

uv run scripts/convert_dataset.py SOURCE TARGET [--pictures copy|png|av1|h264]

    ~/data/old ~/data/new                      v2.x → v3.0; pictures are copied bit for bit
    ~/data/old ~/data/new --pictures h264      re-encoded for random access

SOURCE is a folder or an address on the Hugging Face hub; TARGET must not exist, and appears only
when complete. Random frames of a video with distant key frames (H.264 often has one in 250) decode
at a tenth of the speed; av1 and h264 write a key frame every second picture (--group). Both are
lossy, png is not. Depth is always copied. Timestamps, text and other columns are kept, and anything
that cannot be kept is reported. Statistics of numbers are exact; those of copied pictures come from
up to twenty frames of each episode.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from shallow_pi import flags
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.data.lerobot import convert, hub, reader, video_writer


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The dataset to convert, and its new format."""

    # The dataset: a folder, or owner/name[@revision] on the hub.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    # The folder to create.
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    # Copy videos and images unchanged, or re-encode all of them.
    pictures: Literal["copy", "png", "av1", "h264"] = "copy"
    # av1 and h264: distance between key frames, in pictures.
    group: int = 2
    # av1 and h264: constant rate factor; smaller means better quality and larger files.
    crf: int = 30
    # Leave out unreadable episodes, and report their number.
    skip_bad_episodes: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, convert, print the folder."""
    given = flags.parse(Arguments, arguments, __doc__ or "", idle=_idle)
    with exits.exit_on():
        run_folder.check_output(given.target, "give another TARGET", is_new=True)
        source = reader.Dataset(
            hub.locate(given.source),
            keys=(),
            skip_bad_episodes=given.skip_bad_episodes,
            skip_flag="--skip-bad-episodes",
        )
        pictures: Literal["copy", "png"] | video_writer.Encoding
        if given.pictures == "copy" or given.pictures == "png":
            pictures = given.pictures
        else:
            pictures = video_writer.Encoding(given.pictures, given.group, given.crf)
        print(convert.convert(source, given.target, pictures))


def _idle(given: Arguments) -> flags.Idle:
    reason = f"--pictures {given.pictures} encodes no video; give --pictures av1 or h264"
    yield given.pictures in ("copy", "png"), "group crf", reason
