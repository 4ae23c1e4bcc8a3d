"""Experiments: `DistillConfig`, and the parts it is made of.

An experiment is a file of `train_configs/` with a docstring and `get_config() -> DistillConfig`,
named after its file (see `command_line`). Only the modules that CONTRIBUTING.md lists see a
`DistillConfig`; every other function takes the small dataclass it needs.
"""

import dataclasses
import pathlib
from typing import Literal

import tyro

from shallow_pi import flags
from shallow_pi.data import data_config
from shallow_pi.distill import layer_map
from shallow_pi.distill import losses as loss_terms
from shallow_pi.distill import student as students
from shallow_pi.models import observation, pi0
from shallow_pi.parallel import sharding
from shallow_pi.training import optimizer as optimizers
from shallow_pi.training import profiling


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The trained deep policy; it is only read."""

    # Checkpoint in openpi's layout: a step folder, local, gs:// or hf://. "random" draws random
    # parameters, for trying things out and measuring speed.
    path: str
    # Dtype of its parameters in memory.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Keep its layers in host memory and copy one at a time to the devices. At full size this
    # saves 4.6 GB of device memory, at the cost of copying the layers in every step.
    offload: bool = False
    # Train it first, with --teacher.config, instead of reading --teacher.path.
    train: bool = False
    # Config that trains it (scripts/train_teacher.py); empty if there is none.
    config: str = ""


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The layers of the shallow policy, and its initial parameters."""

    # Layers of backbone and action expert.
    depth: int = 6
    # Backbone layers that are kept whole, if different from --student.depth. Of the others only
    # keys and values remain, for the expert. The shallower of backbone and expert has an evenly
    # spaced subset of the other's layers.
    backbone_depth: int = 0
    # Layers of the action expert, if different from --student.depth.
    expert_depth: int = 0
    # Layers of the image tower, evenly spaced; 0 keeps all. A cut tower has a loss on its
    # tokens (--losses.vision).
    vision_depth: int = 0
    # Image tokens per camera that the backbone reads, such as 128 or 64 of 256; 0 keeps the
    # teacher's.
    image_tokens: int = 0
    # Choice of --student.image-tokens: "pool" averages neighbouring tokens (2 × 2 for
    # 64), "scored" keeps those that a scorer expects the teacher's actions to attend to most.
    # openpi cannot run "scored".
    image_token_choice: Literal["pool", "scored"] = "pool"
    # Strategy that chooses layers of the teacher. Four measure the teacher on the first batch:
    # similarity (cosine of input and output) and cka drop the layers that change their input least;
    # sensitivity (error when skipped) and gate (gradient of a gate on the layer) drop those whose
    # absence costs least.
    strategy: layer_map.Strategy = "uniform"
    # Teacher layers to keep, in increasing order, in place of a strategy; this sets the depth too.
    layers: tuple[int, ...] = ()
    # Those of --student.layers whose backbone is whole, in place of --student.backbone-depth.
    backbone_layers: tuple[int, ...] = ()
    # Those of --student.layers with an action expert, in place of --student.expert-depth.
    expert_layers: tuple[int, ...] = ()
    # Seed of the strategy "random".
    layer_seed: int = 0
    # Initial parameters: cut out of the teacher, or random.
    init: Literal["cut", "random"] = "cut"
    # Integration steps that the student is deployed with, stored in its checkpoints. For fewer
    # than 10, train with --losses.reflow.
    num_steps: int = 10
    # 8-bit format of the matrix products that the student is deployed with, stored in its
    # checkpoints. Training rounds its weights. To round activations too, calibrate the trained
    # student (scripts/calibrate.py).
    quantize: Literal["none", "int8", "fp8"] = "none"
    # Parts to copy from the teacher and not train: "vision" (the image tower, which then runs
    # once for both models), "embedder" (the token embedding). Frozen parts need no moments.
    freeze: tuple[students.Part, ...] = ()

    def __post_init__(self) -> None:
        flags.at_least(self, 1, "depth", "num_steps", prefix="student.")
        counts = ("backbone_depth", "expert_depth", "vision_depth", "image_tokens")
        flags.at_least(self, 0, *counts, prefix="student.")
        if self.image_token_choice == "scored" and not self.image_tokens:
            raise ValueError(
                "--student.image-token-choice scored chooses --student.image-tokens of each "
                "camera: give that number too"
            )
        if self.layers and self.strategy != type(self).strategy:
            raise ValueError(
                f"--student.layers {' '.join(map(str, self.layers))} and --student.strategy "
                f"{self.strategy} both choose the layers: give only one"
            )
        for stream in ("backbone", "expert"):
            named = getattr(self, f"{stream}_layers")
            listed = " ".join(map(str, named))
            if named and getattr(self, f"{stream}_depth"):
                raise ValueError(
                    f"--student.{stream}-layers {listed} and --student.{stream}-depth say the same "
                    "thing: give only one"
                )
            if list(named) != sorted(set(named)):
                raise ValueError(
                    f"--student.{stream}-layers {listed}: give each layer once, in increasing order"
                )
            if lacking := [str(i) for i in named if i not in self.layers]:
                need = (
                    ""
                    if stream == "backbone"
                    else (": an expert layer needs its backbone layer, at least as keys and values")
                )
                raise ValueError(
                    f"--student.{stream}-layers {listed}: {', '.join(lacking)} not among "
                    f"--student.layers {' '.join(map(str, self.layers)) or '(none)'}{need}; add it "
                    "there"
                )

    @property
    def cuts(self) -> list[str]:
        """The flags given that say how a student is cut out of a teacher."""
        names = (
            *("depth", "layers", "strategy", "backbone_depth", "expert_depth", "vision_depth"),
            *("backbone_layers", "expert_layers", "image_tokens"),
        )
        given = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        return [flags.as_flag(f"student.{name}") for name in given]

    @property
    def total_depth(self) -> int:
        """Layers that at least one stream has."""
        if self.layers:
            return len(self.layers)
        return max(self.backbone_depth or self.depth, self.expert_depth or self.depth)

    def cut(self, teacher: pi0.Pi0Config) -> pi0.Pi0Config:
        """The student's architecture.

        Raises:
          ValueError: a depth that the teacher, or the student's layers, do not have; image tokens
            that do not divide the patches, or are more.
        """
        depth = self.total_depth
        usual = depth if self.layers else self.depth
        backbone = expert = tuple(range(depth))
        if self.backbone_layers:
            backbone = tuple(map(self.layers.index, self.backbone_layers))
        elif (count := self.backbone_depth or usual) != depth:
            backbone = layer_map.backbone_positions(count, depth)
        if self.expert_layers:
            expert = tuple(map(self.layers.index, self.expert_layers))
        elif (count := self.expert_depth or usual) != depth:
            expert = layer_map.expert_positions(count, depth)
        halves = layer_map.halves(depth, backbone, expert)
        if ("absent", "absent") in zip(*halves, strict=True):
            raise ValueError(
                "neither stream has all of --student.layers: leave out those that both lack"
            )
        model = pi0.at_depth(teacher, depth)
        image = dataclasses.replace(model.image, depth=self.vision_depth or model.image.depth)
        model = dataclasses.replace(
            model, backbone_layers=halves[0], expert_layers=halves[1], image=image
        )
        students.vision_layers(teacher, model)  # Checks the depth.
        try:
            if self.image_token_choice == "scored":
                return dataclasses.replace(model, scored_tokens=self.image_tokens)
            return dataclasses.replace(
                model, pooled_tokens=self.image_tokens or teacher.pooled_tokens
            )
        except ValueError as error:
            raise ValueError(f"--student.image-tokens {self.image_tokens}: {error}") from error


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Validation on the held-out episodes (--data.held-out)."""

    # Steps between validations; the last step is validated too. 0 turns validation off.
    interval: int = 1000
    # Held-out samples, evenly spaced over the episodes.
    samples: int = 64
    # Integration steps of both samplers; 0 uses the student's own number, and 10 for the teacher.
    num_steps: int = 0
    # Reference actions that decide which step is best. "data" uses the recorded ones, which define
    # the task even if the teacher (a base model) has not learned it; "teacher" uses the teacher's
    # from the same noise, to reproduce the teacher.
    against: Literal["data", "teacher"] = "data"

    def __post_init__(self) -> None:
        flags.at_least(self, 0, "interval", "num_steps", prefix="validation.")
        flags.at_least(self, 1, "samples", prefix="validation.")


@dataclasses.dataclass(frozen=True)
class ClosedLoopConfig:
    """The simulator that makes demonstrations and evaluates policies."""

    # Name of a simulator, or MODULE:CLASS of your own suite (see sims/simulator.py).
    sim: str = "turntable"
    # Tasks to draw from: touch, insert. Another simulator has its own tasks, all by default.
    tasks: tuple[str, ...] = ("touch", "insert")
    # Blocks in a scene of the turntable.
    num_blocks: int = 2
    # Cups in a scene of the turntable.
    num_cups: int = 2
    # Radial play of the turntable's peg in a cup, millimetres.
    clearance_mm: float = 3.0
    # Speed of the turntable's disc, degrees a second.
    disc_speed_deg: float = 0.0
    # Other options of the simulator as NAME=VALUE, such as image_size=96.
    options: tuple[str, ...] = ()
    # Number of demonstrations to collect.
    demonstrations: int = 400
    # Tasks of the demonstrations, if different from --closed-loop.tasks; a task that is named twice
    # is drawn twice as often.
    demonstrated: tuple[str, ...] = ()
    # Scale of the perturbations during demonstrations.
    noise: float = 1.0
    # Seed of the demonstrations.
    seed: int = 0
    # Number of evaluation episodes per policy.
    episodes: int = 100
    # Seed of the first evaluation episode.
    eval_seed: int = 1_000_000
    # Harder variants, only for evaluation: tight (insert with 1.5 mm of play), crowded (three
    # blocks and three cups). Another simulator has its own variants, all by default.
    harder: tuple[str, ...] = ("tight", "crowded")
    # Actions of a chunk to execute before the next plan.
    execute_steps: int = 5
    # Integration steps of every policy; 0 uses the student's own number, and 10 for the teacher.
    num_steps: int = 0
    # Also train the baselines: task loss only, from the same cut and from random weights.
    baselines: bool = True

    def __post_init__(self) -> None:
        counts = ("demonstrations", "episodes", "execute_steps")
        flags.at_least(self, 1, *counts, prefix="closed_loop.")
        flags.at_least(self, 0, "num_steps", prefix="closed_loop.")
        self.set_options()

    def set_options(self) -> dict[str, object]:
        """The simulator's options: fields that differ from their defaults, and `options`.

        For the other fields the simulator has its own defaults; the turntable's are the same.
        """
        own = ("tasks", "num_blocks", "num_cups", "clearance_mm", "disc_speed_deg")
        found = {name: getattr(self, name) for name in own}
        found = {name: value for name, value in found.items() if value != getattr(type(self), name)}
        given = flags.pairs(self.options, "--closed-loop.options")
        if twice := sorted(found.keys() & given.keys()):
            raise ValueError(
                f"{flags.as_flag(f'closed_loop.{twice[0]}')} and --closed-loop.options {twice[0]}= "
                "set the same option: give only one"
            )
        return found | given

    def set_demonstrated(self) -> dict[str, object]:
        """As `set_options`, for the simulator of the demonstrations."""
        return self.set_options() | ({"tasks": self.demonstrated} if self.demonstrated else {})

    def set_harder(self) -> tuple[str, ...] | None:
        """Harder variants for evaluation; None, the default, is all of the simulator's."""
        return None if self.harder == type(self).harder else self.harder


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A complete experiment; it is resolved and saved beside its checkpoints."""

    # Architecture of the teacher; the student's is cut from it (--student).
    model: pi0.Pi0Config
    # Training data.
    data: data_config.DataConfig
    # Name of the config; set from its file's name.
    name: tyro.conf.Suppress[str] = ""
    # The trained deep policy; without one, `model` itself is trained on the task loss.
    teacher: TeacherConfig | None = None
    # The shallow policy: its layers, and its initial parameters.
    student: StudentConfig = dataclasses.field(default_factory=StudentConfig)
    # Weights and switches of the losses.
    losses: loss_terms.Losses = dataclasses.field(default_factory=loss_terms.Losses)
    # Augmentation of the training images.
    augmentation: observation.Augmentation = dataclasses.field(
        default_factory=observation.Augmentation
    )
    # Learning-rate schedule.
    schedule: optimizers.CosineSchedule = dataclasses.field(
        default_factory=optimizers.CosineSchedule
    )
    # AdamW, with gradient clipping before it.
    optimizer: optimizers.AdamW = dataclasses.field(default_factory=optimizers.AdamW)
    # Errors on held-out episodes (--data.held-out), and the choice of the best step.
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    # Layout of the devices.
    mesh: sharding.MeshConfig = dataclasses.field(default_factory=sharding.MeshConfig)
    # Simulated task to evaluate policies on; without one the report holds losses and validation.
    closed_loop: ClosedLoopConfig | None = None
    # Name of this run; its folder is CHECKPOINT_DIR/CONFIG/EXP_NAME.
    exp_name: str = "first"
    # Folder of all runs.
    checkpoint_dir: str = "checkpoints"
    # Continue an interrupted run.
    resume: bool = False
    # Rename an existing run of this name and start a new one.
    overwrite: bool = False
    # Seed of parameters, data order, augmentation, noise and time.
    seed: int = 42
    # Observations per step, over all devices.
    batch_size: int = 64
    # (noise, time) draws per observation; they share its prefix.
    draws: int = 1
    # Microbatches per step.
    accumulation: int = 1
    # Activations that the backward pass recomputes: "layers" recomputes whole layers (least
    # memory), "dots" everything except products with weights and flash attention, "none" nothing.
    # "auto" is "dots" if that is estimated to fit the devices' memory; otherwise, or if their
    # memory is unknown, it is "layers".
    remat: Literal["auto", "layers", "dots", "none"] = "auto"
    # Unroll the student's layers instead of scanning them. This takes several times as long to
    # compile, and skips the last layer's unused work on the prefix.
    unroll: bool = False
    # Attention of image tower and prefix: "xla", cuDNN's flash attention ("cudnn"), or cuDNN's in
    # the "tower" alone. In bfloat16, "auto" is cudnn on Hopper GPUs and tower on other NVIDIA GPUs
    # from Ampere on; otherwise, and for absent devices, it is xla. Action tokens always use xla.
    attention: Literal["auto", "xla", "cudnn", "tower"] = "auto"
    # Number of optimizer steps.
    num_train_steps: int = 30_000
    # Decay of the moving average of the parameters; 0 turns it off.
    ema_decay: float = 0.0
    # Steps between rows of metrics; a row is a mean over these steps.
    log_interval: int = 100
    # Steps between measurements of each loss's own gradient norm; 0 turns them off.
    gradient_interval: int = 0
    # Steps between checkpoints.
    save_interval: int = 1000
    # Number of latest checkpoints to keep, besides the one with the lowest validation error (best).
    keep: int = 1
    # Keep checkpoints at multiples of this step forever; 0 keeps none of them.
    keep_period: int = 5000
    # Steps to trace as FIRST:END, without END: 10:15 traces steps 10 to 14; empty for none.
    profile: str = ""
    # Write TensorBoard events.
    tensorboard: bool = True
    # Weights & Biases project to log to; empty for none.
    wandb: str = ""
    # Trackio project to log to; empty for none.
    trackio: str = ""

    def __post_init__(self) -> None:
        counts = ("batch_size", "draws", "accumulation", "num_train_steps", "log_interval")
        flags.at_least(self, 1, *counts, "save_interval", "keep")
        flags.at_least(self, 0, "gradient_interval", "keep_period")
        profiling.parse(self.profile, self.num_train_steps)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema-decay must lie in [0, 1), got {self.ema_decay}")
        if self.model.dtype == "float16":
            raise ValueError("--model.dtype must be 'bfloat16' or 'float32', got 'float16'")
        if self.batch_size % (n := self.accumulation):
            raise ValueError(
                f"--batch-size {self.batch_size} must be a multiple of --accumulation {n}"
            )
        if self.exp_name == ".." or pathlib.PurePath(self.exp_name).name != (self.exp_name or "."):
            raise ValueError(f"--exp-name must be a plain folder name, got {self.exp_name!r}")
        if "://" in self.checkpoint_dir:
            raise ValueError(
                f"--checkpoint-dir {self.checkpoint_dir} is an address, but a run needs a folder "
                "on a file system that renames folders atomically, which object stores do not; "
                "give such a folder, or mount the bucket as docs/launch.md describes"
            )
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume continues a run, --overwrite starts a new one: give only one"
            )
        self.fixed_layer_map()
        if tokens := self.model.scored_tokens:
            raise ValueError(
                f"--model.scored-tokens {tokens}: the teacher must see all image tokens; give "
                "--student.image-token-choice scored and --student.image-tokens"
            )
        if self.student.image_token_choice == "scored" and self.losses.scorer == 0:
            raise ValueError(
                "--student.image-token-choice scored: the scorer is trained only by "
                "--losses.scorer, which is 0; give that loss a weight, or leave the flag out"
            )
        if self.teacher is not None:
            self.student.cut(self.model)
        elif self.student.cuts:
            raise ValueError(
                f"{', '.join(self.student.cuts)}: these cut a student out of a teacher, but there "
                "is no teacher; leave them out (--model.depth sets the depth of the model)"
            )
        if self.teacher is None and self.validation.against == "teacher":
            raise ValueError("--validation.against teacher needs a teacher; set it to data")

    @property
    def folder(self) -> pathlib.Path:
        """The run's folder."""
        return pathlib.Path(self.checkpoint_dir).expanduser() / self.name / self.exp_name

    @property
    def student_model(self) -> pi0.Pi0Config:
        """The architecture that is trained."""
        if self.teacher is None:
            return self.model
        return self.student.cut(self.model)

    def fixed_layer_map(self) -> layer_map.LayerMap | None:
        """The layer map; None without a teacher, or if the strategy measures the teacher first."""
        student, teacher_depth = self.student, self.model.depth
        if self.teacher is None:
            return None
        depth = student.total_depth
        if student.layers:
            return layer_map.explicit(student.layers, teacher_depth)
        if not 1 <= depth <= teacher_depth:
            flags_of = ("backbone_depth", "expert_depth", "depth")
            name = next(name for name in flags_of if getattr(student, name) == depth)
            raise ValueError(
                f"{flags.as_flag(f'student.{name}')} must lie in 1..{teacher_depth} (the "
                f"teacher's layers), got {depth}"
            )
        if student.strategy == "random":
            return layer_map.random(depth, teacher_depth, student.layer_seed)
        if student.strategy in layer_map.MEASURED:
            return None
        choose = {"uniform": layer_map.uniform, "first": layer_map.first, "last": layer_map.last}
        return choose[student.strategy](depth, teacher_depth)


def defaults(config: object) -> dict[str, object]:
    """The default of each field of a config that has one; of a nested config, those of its fields.

    Names are nested as in `dataclasses.asdict(config)`.
    """
    found: dict[str, object] = {}
    assert dataclasses.is_dataclass(config), f"expected a config, got {config!r}"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default_factory is not dataclasses.MISSING:
            found[field.name] = _plain(field.default_factory())
        elif field.default is not dataclasses.MISSING and field.default is not None:
            found[field.name] = _plain(field.default)
        elif dataclasses.is_dataclass(value):
            found[field.name] = defaults(value)
        elif field.default is None:
            found[field.name] = None
    return found


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


# Fields that may change when a run is resumed.
SAFE_TO_CHANGE = frozenset(
    (
        *("resume", "overwrite", "checkpoint_dir", "mesh", "num_train_steps", "save_interval"),
        *("keep", "keep_period", "log_interval", "gradient_interval", "validation.interval"),
        *("tensorboard", "wandb", "trackio", "profile", "data.num_threads", "data.num_workers"),
        *("remat", "unroll", "attention", "teacher.offload"),
        *("data.cache", "data.cache_dir", "data.cache_gib", "data.strict"),
        *("closed_loop.baselines", "closed_loop.episodes", "closed_loop.harder"),
        *("closed_loop.num_steps", "teacher.train", "teacher.config"),
    )
)
