"""Pickle a MuJoCo simulator in the middle of an episode.

Scenes are compiled anew and the episode is laid out again from its seed, so that a pickle holds
only what steps have changed since: the physics, and a few attributes.
"""

from typing import Any, Protocol

import mujoco
import numpy as np

_PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION


class Running(Protocol):
    """The parts of a simulator that a pickle is made of."""

    # Builds the simulator.
    config: Any
    # Names of the attributes that steps change.
    changing: tuple[str, ...]
    # Of the episode; None before the first.
    _seed: int | None

    @property
    def model(self) -> mujoco.MjModel: ...
    @property
    def data(self) -> mujoco.MjData: ...
    def reset(self, seed: int) -> None: ...


class Picklable:
    """The methods by which a simulator (see `Running`) is pickled between steps."""

    def __getstate__(self: Running) -> dict[str, Any]:
        if self._seed is None:
            return {"config": self.config, "seed": None}
        physics = np.empty(mujoco.mj_stateSize(self.model, _PHYSICS))
        mujoco.mj_getState(self.model, self.data, physics, _PHYSICS)
        changed = {name: getattr(self, name) for name in self.changing}
        return {"config": self.config, "seed": self._seed, "physics": physics, "changed": changed}

    def __setstate__(self: Running, pickled: dict[str, Any]) -> None:
        self.__init__(pickled["config"])  # type: ignore[misc]  # scenes are compiled anew
        if pickled["seed"] is None:
            return
        self.reset(pickled["seed"])
        for name, value in pickled["changed"].items():
            setattr(self, name, value)
        mujoco.mj_setState(self.model, self.data, pickled["physics"], _PHYSICS)
        mujoco.mj_fwdPosition(self.model, self.data)
