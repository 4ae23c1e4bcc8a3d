"""The turntable: a peg on a gantry touches the named block or enters the named cup.

Blocks and cups in random places and colours; only the prompt says which one is meant. The state is
the tip's own position. Bench and expert are `gantry`'s.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from shallow_pi.data.robots import robot as robots
from shallow_pi.sims import gantry, simulator

PROMPTS: dict[str, tuple[str, ...]] = {
    "touch": ("touch the {colour} block", "tap the {colour} block"),
    "insert": ("put the peg into the {colour} cup", "insert the peg in the {colour} cup"),
}


@dataclasses.dataclass(frozen=True)
class Suite:
    """One family of episodes; all of them share one compiled scene (see `simulator.Suite`)."""

    # Tasks to draw from, equally likely: names in PROMPTS.
    tasks: tuple[str, ...] = ("touch", "insert")
    # Blocks on the disc, each of a different colour.
    num_blocks: int = 2
    # Cups on the disc, each of a different colour (which a block may share).
    num_cups: int = 2
    # Radial play of the peg in a cup, millimetres.
    clearance_mm: float = 3.0
    # Speed of the disc in degrees a second, counter-clockwise as seen from above.
    disc_speed_deg: float = 0.0
    # Actions a second.
    control_hz: float = 20.0
    # Height and width of the images in pixels.
    image_size: int = 48
    # Length of an episode in seconds, at most.
    max_seconds: float = 4.0
    # Images by ray casting ("ray") or by MuJoCo's OpenGL renderer ("gl").
    renderer: Literal["ray", "gl"] = "ray"

    def __post_init__(self) -> None:
        gantry.check(self, PROMPTS)
        for name, task in (("num_blocks", "touch"), ("num_cups", "insert")):
            count, least = getattr(self, name), int(task in self.tasks)
            if not least <= count <= 4:
                raise ValueError(f"{name}: expected {least} to 4 for {self.tasks}, got {count}")
        if not 0.5 <= self.clearance_mm <= 8.0:
            raise ValueError(f"clearance_mm: expected 0.5 to 8, got {self.clearance_mm}")

    @property
    def robot(self) -> robots.Robot:
        """The gantry."""
        return dataclasses.replace(robots.TURNTABLE, fps=self.control_hz)

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Axes of the tip's position and of its target."""
        return dict.fromkeys((*self.robot.state_keys, self.robot.action_key), ("x", "y", "z"))

    def make(self) -> "Turntable":
        """Compile the scene."""
        return Turntable(self)

    def task_names(self) -> tuple[str, ...]:
        """The tasks to draw from."""
        return self.tasks

    def prompts(self) -> list[str]:
        """Every instruction of every task."""
        return gantry.prompts(PROMPTS)

    def moving(self) -> "Suite":
        """The disc turns, at the speed of the paper's turntable."""
        return dataclasses.replace(self, disc_speed_deg=self.disc_speed_deg or 15.0)

    def harder(self) -> Mapping[str, "Suite"]:
        """Less play; more to choose from."""
        return {
            "tight": dataclasses.replace(self, tasks=("insert",), clearance_mm=1.5),
            "crowded": dataclasses.replace(self, num_blocks=3, num_cups=3),
        }

    def expert(self) -> simulator.Expert:
        """Go above the target, descend while coming into line, and keep pressing."""
        return gantry.reach

    def demonstrate(
        self, sim: simulator.Simulator, rng: np.random.Generator, noise: float
    ) -> Iterator[tuple[simulator.Observation, simulator.Action]]:
        """Play a perturbed episode; yield what is seen, and the expert's own action there."""
        assert isinstance(sim, Turntable), "made by this suite"
        return gantry.demonstrate(sim, gantry.reach, rng, noise)


class Turntable(gantry.Sim):
    """The simulator of one suite."""

    config: Suite

    def __init__(self, config: Suite):
        super().__init__(config)
        self.bench = gantry.Bench(
            config.num_blocks, config.num_cups, config.clearance_mm, config.control_hz
        )
        self.speed = float(np.deg2rad(config.disc_speed_deg))

    def _lay_out(self, rng: np.random.Generator) -> None:
        config, is_cup = self.config, self.bench.is_cup
        self.task = config.tasks[rng.integers(len(config.tasks))]
        template = PROMPTS[self.task][rng.integers(len(PROMPTS[self.task]))]
        colours = gantry.colours(rng, config.num_blocks, config.num_cups)
        self.target = int(rng.choice(np.flatnonzero(is_cup == (self.task == "insert"))))
        self.prompt = template.format(colour=colours[self.target])
        self.colours = colours  # Of the objects: blocks first, then cups.
        places = gantry.scatter(rng, len(is_cup))
        start = rng.uniform((-0.12, -0.12, 0.05), (0.12, 0.12, 0.10))
        self.bench.lay_out(places, colours, start, self.speed)
