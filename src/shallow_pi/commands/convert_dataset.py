"""Convert a LeRobot dataset (v2.0, v2.1, v3.0) to v3.0, and its pictures to what reads quickly.

uv run scripts/convert_dataset.py SOURCE TARGET [--pictures copy|png|av1|h264]

    ~/data/old ~/data/new                      v2.x → v3.0; pictures are copied bit for bit
    ~/data/old ~/data/new --pictures h264      and encoded anew for random access

SOURCE is a folder or an address on the Hugging Face hub; TARGET must not exist, and appears when it
is complete. Video with a long way from key frame to key frame (H.264 often has 250) decodes at a
tenth of the speed when frames are drawn at random; av1 and h264 write a key frame every second
picture (--group). They are lossy, png is not. Depth is always copied. Timestamps, text and other
columns are kept, and what cannot be kept is named. Statistics of numbers are exact; those of copied
pictures come from up to twenty frames of each episode.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from shallow_pi import flags
from shallow_pi.commands import exits
from shallow_pi.data.lerobot import convert, hub, reader, video_writer


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Dataset to convert, and its new form."""

    # The dataset: a folder, or owner/name[@revision] on the hub.
    source: Annotated[str, tyro.conf.Positional]
    # The folder to make.
    target: Annotated[str, tyro.conf.Positional]
    # Copy videos and images as they are, or decode and encode all of them anew.
    pictures: Literal["copy", "png", "av1", "h264"] = "copy"
    # av1 and h264: pictures from one key frame to the next.
    group: int = 2
    # av1 and h264: constant rate factor, smaller is better and larger in bytes.
    crf: int = 30
    # Leave out episodes that cannot be read, and count them.
    skip_bad_episodes: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, convert, say where it is."""
    given = flags.parse(Arguments, arguments, __doc__ or "")
    with exits.exit_on():
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
