"""Convert a LeRobot dataset (v2.0, v2.1, v3.0) to v3.0, and its pictures to what reads quickly.

uv run scripts/convert_dataset.py SOURCE TARGET [--pictures copy|png|av1|h264]

    ~/data/old ~/data/new                      v2.x → v3.0; videos are copied bit for bit
    ~/data/old ~/data/new --pictures h264      and encoded anew for random access

SOURCE is a folder or an address on the Hugging Face hub; TARGET must not exist, and appears when it
is complete. Video with a long way from key frame to key frame (H.264 often has 250) decodes at a
tenth of the speed when frames are drawn at random; av1 and h264 write a key frame every second
picture (--group). They are lossy, png is not. Statistics of numbers are exact; those of copied
videos come from up to twenty frames of each episode.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import tyro

from shallow_pi import progress
from shallow_pi.data.lerobot import columns, hub, reader, video_writer
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.training import command_line

SAMPLED = 20
BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to convert, and into what."""

    # The dataset: a folder, or owner/name[@revision] on the hub.
    source: Annotated[str, tyro.conf.Positional]
    # The folder to make.
    target: Annotated[str, tyro.conf.Positional]
    # Copy videos that hold one episode each (v2.x) and keep images, or encode everything anew.
    pictures: Literal["copy", "png", "av1", "h264"] = "copy"
    # av1 and h264: pictures from one key frame to the next.
    group: int = 2
    # av1 and h264: constant rate factor, smaller is better and larger in bytes.
    crf: int = 30
    # Leave out episodes that cannot be read, and count them.
    skip_bad_episodes: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, convert, say where it is."""
    given = tyro.cli(Arguments, args=arguments, description=__doc__)
    with command_line.exit_on():
        source = reader.Dataset(hub.locate(given.source), skip_bad_episodes=given.skip_bad_episodes)
        for episode, reason in source.skipped.items():
            progress.console.print(f"warning: episode {episode} is left out: {reason}")
        print(convert(source, given))


def convert(source: reader.Dataset, given: Arguments) -> str:
    """Write the dataset anew, episode by episode."""
    videos = [key for key in source.cameras if source.features[key]["dtype"] == "video"]
    if given.pictures == "copy" and videos and source.layout.version == "v3.0":
        raise ValueError(
            f"{source.path} is v3.0 already; to encode its videos anew give --pictures av1 or h264"
        )
    encoding = None
    if given.pictures in ("av1", "h264"):
        encoding = video_writer.Encoding(given.pictures, given.group, given.crf)
    keys = [
        key
        for key in source.columns
        if key not in BOOKKEEPING and not columns.is_text(source.features[key])
    ]
    names = {key: source.features[key].get("names") for key in keys}
    flat = {key: value for key, value in names.items() if isinstance(value, list)}
    episodes = source.columns["episode_index"]
    with (
        lerobot_writer.Writer(
            given.target,
            int(source.fps) if source.fps == int(source.fps) else source.fps,
            robot_type=source.info.get("robot_type"),
            names=flat,
            encoding=encoding,
        ) as writer,
        progress.bar("Convert episodes", source.num_episodes) as advance,
    ):
        for episode in source.episodes:
            rows = np.flatnonzero(episodes == episode)
            images, copies = {}, {}
            for key in source.cameras:
                chosen = rows
                if given.pictures == "copy" and key in videos:
                    copies[key] = source.path / source.layout.video(episode, key)[0]
                    places = np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows)))
                    chosen = rows[np.round(places).astype(int)]
                images[key] = np.stack([source.picture(int(i), key) for i in chosen])
            vectors = {key: source.columns[key][rows] for key in keys}
            writer.add(images, vectors, [source.task(int(i)) for i in rows], copies=copies)
            advance(1)
    return str(writer.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
