"""The recordings of LeRobot's PushT in the fixtures, their robot, and ways to damage a copy."""

import json
import pathlib

import polars as pl

from shallow_pi.data.robots import robot as robots

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot"
IMAGE, VIDEO = FIXTURES / "pusht_v30_image", FIXTURES / "pusht_v30_video"
OLD = FIXTURES / "pusht_v21_video"
ROBOT = robots.Robot(
    name="pusht",
    cameras={
        "base_0_rgb": "observation.images.top",
        "left_wrist_0_rgb": "observation.images.wrist",
    },
    state_dim=2,
    action_dim=2,
    fps=10,
)


def edit_info(path: pathlib.Path, **changes) -> None:
    """Change entries of info.json; None removes one."""
    file = path / "meta" / "info.json"
    info = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in info.items() if v is not None}))


def edit_data(path: pathlib.Path, *columns: pl.Expr | pl.Series) -> None:
    """Add or replace columns of the recorded frames."""
    file = path / "data" / "chunk-000" / "file-000.parquet"
    pl.read_parquet(file).with_columns(*columns).write_parquet(file)
