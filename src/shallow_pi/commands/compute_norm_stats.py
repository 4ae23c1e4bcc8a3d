"""Compute a dataset's normalization statistics, exactly and without decoding images.

uv run scripts/compute_norm_stats.py NAME [--data.path PATH] [--output FOLDER]

    pi0_aloha_l6 --data.path ~/data/my_aloha     robot, horizon and normalization of that config
    --data.path ~/data/my_arm --data.robot my_arm.py --data.asset-id my_arm --horizon 50
    --openpi.config pi05_libero --data.path ...  an openpi config instead of NAME (needs openpi)

PATH is a LeRobot dataset: a folder, or an address on the Hugging Face hub. `--data.more` adds
datasets, `--data.held-out` excludes the episodes that a run holds out. The statistics describe
states and action chunks as the model sees them (converted, and relative to the state where the
robot's description says so). Dimensions with a degenerate scale cause warnings.

They are written to FOLDER/norm_stats.json in openpi's format (default:
norm_stats/<config or dataset>/<asset id>), and the flags that train with them are printed. Without
these flags a run uses its teacher's statistics, the right choice if the teacher knows the robot.

With `--data.norm-stats`, the dataset is compared with those statistics, and nothing is written.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from shallow_pi import flags, progress
from shallow_pi.checkpoints import fetch, run_folder
from shallow_pi.commands import exits
from shallow_pi.data import data_config, opening, sources
from shallow_pi.data.lerobot import reader
from shallow_pi.data.robots import checkpoint_statistics, normalize, statistics
from shallow_pi.data.robots import robot as robots
from shallow_pi.interop import openpi_flag
from shallow_pi.training import command_line


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The dataset, the horizon and the output folder."""

    # The dataset and its robot.
    data: data_config.DataConfig
    # Actions in a chunk: the model's action horizon.
    horizon: int = 50
    # Normalization of the model: z_score (π0) or quantile (π0.5); used for warnings only.
    kind: normalize.Kind = "z_score"
    # Folder for norm_stats.json.
    output: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, compute, warn, write."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with exits.exit_on(ModuleNotFoundError):
        own, words = openpi_flag.cli(words)
        if own is not None and own.data.source != "lerobot":  # Read by openpi, from its own place.
            own = dataclasses.replace(own, data=dataclasses.replace(own.data, path=""))
        elif own is None and words and not words[0].startswith("-"):
            own = command_line.load(command_line.configs(), words.pop(0))
        name, default = "", Arguments(data=data_config.DataConfig())
        if own is not None:
            name = own.name  # Of a file of one's own, without its folder.
            kind = normalize.kind_of(own.model.pi05)
            default = Arguments(own.data, own.model.action_horizon, kind)
        given = flags.parse(Arguments, words, __doc__ or "", default=default, idle=_idle)
        if not given.data.path:
            raise ValueError("name a dataset with --data.path: a folder, or owner/name on the hub")
        flags.at_least(given, 1, "horizon")
        if ":" in given.data.robot:
            raise ValueError(
                f"robot {given.data.robot!r}: no robot here has the config's transforms; compute "
                "statistics with openpi's own scripts/compute_norm_stats.py, or describe the "
                "robot with --data.robot (docs/robots.md)"
            )
        robot = robots.find(given.data.robot)
        if not name and "--data.asset-id" not in flags.named(words):
            data = dataclasses.replace(given.data, asset_id=robot.name)
            given = dataclasses.replace(given, data=data)
        if not _compared(given.data):
            run_folder.check_output(given.output or "norm_stats", "give another --output")
        # No images are read, so no video is fetched from the hub.
        looks = given.data.skip_bad_episodes
        datasets, _ = opening.open_datasets(given.data, robot, images=looks)
        with progress.bar("Statistics", robot.state_dim + robot.action_dim) as advance:
            found = sources.norm_stats(datasets, robot, given.horizon, advance)
        _tell(datasets, found, given, name or datasets[0].path.name)


def _idle(given: Arguments) -> flags.Idle:
    fields = f"{opening.UNREAD} data.tokenizer"
    yield True, fields, "the statistics do not depend on it; leave it out"
    compared = _compared(given.data)
    yield compared, "output", f"--data.norm-stats {compared} is compared, and nothing is written"
    yield not compared, "kind", "only a comparison depends on it; give --data.norm-stats"


def _compared(data: data_config.DataConfig) -> str:
    """The folder of the statistics to compare with; empty where the dataset's own are wanted."""
    return "" if data.norm_stats == opening.OF_DATASET else data.norm_stats


def _tell(
    datasets: Sequence[reader.Dataset],
    found: dict[str, normalize.NormStats],
    given: Arguments,
    name: str,
) -> None:
    for line in statistics.doubtful(found):
        progress.warn(line)
    frames, episodes = sum(map(len, datasets)), sum(d.num_episodes for d in datasets)
    skipped = sum(len(dataset.skipped) for dataset in datasets)
    print(f"{frames} frames of {episodes} episodes{f', {skipped} left out' if skipped else ''}")
    if compared := _compared(given.data):
        theirs = checkpoint_statistics.at(fetch.locate(compared), given.data.asset_id).stats
        lines = statistics.misfits(theirs, found, given.kind)
        for line in lines:
            progress.warn(line)
        verdict = "do not fit" if lines else "fit"
        print(f"the statistics in {compared} {verdict} the dataset")
        return
    output = pathlib.Path(given.output or f"norm_stats/{name}/{given.data.asset_id}").expanduser()
    normalize.save(output, found)
    print(output / normalize.FILE_NAME)
    print(f"train with them: --data.norm-stats {output} --data.asset-id {given.data.asset_id}")
