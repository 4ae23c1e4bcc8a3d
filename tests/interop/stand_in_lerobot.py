"""LeRobot's dataset as openpi uses it, in the few calls it makes, over our own reader.

LeRobot wants torch; openpi's data loader wants from LeRobot a length, an item by index (images
float in [0, 1] with channels first, chunks of the keys in `delta_timestamps` with `<key>_is_pad`),
the tasks, the frame rate, and the episode of every frame.
"""

import os
import pathlib

import numpy as np

from shallow_pi.data.lerobot import reader


def _open(repo_id: str) -> reader.Dataset:
    return reader.Dataset(pathlib.Path(os.environ["HF_LEROBOT_HOME"]) / repo_id)


class LeRobotDatasetMetadata:
    """Tasks by index, and the frame rate."""

    def __init__(self, repo_id):
        dataset = _open(repo_id)
        self.tasks, self.fps = dataset.tasks, dataset.fps


class LeRobotDataset:
    """Items by frame."""

    def __init__(self, repo_id, delta_timestamps):
        self._own = _open(repo_id)
        self._chunks = {key: len(times) for key, times in delta_timestamps.items()}
        self.fps = self._own.fps
        self.hf_dataset = {"episode_index": self._own.columns["episode_index"]}

    def __len__(self):
        return len(self._own)

    def __getitem__(self, i):
        item = self._own[i]
        for key in self._own.cameras:
            item[key] = np.moveaxis(item[key], -1, 0).astype(np.float32) / 255
        for key, horizon in self._chunks.items():
            item[key], item[f"{key}_is_pad"] = self._own.chunk(i, horizon, key)
        return item
