"""Parts shared by several experiments: model sizes and schedule of the embedded task."""

import dataclasses
import pathlib

from shallow_pi.data import data_config
from shallow_pi.distill import losses
from shallow_pi.models import gemma, layer_table, observation, pi0, siglip
from shallow_pi.training import config, optimizer

ASSETS = pathlib.Path(__file__).parents[1] / "assets"
OPENPI = "gs://openpi-assets/checkpoints"

LIBERO = "physical-intelligence/libero"
# Share of a real robot's episodes used for validation.
HELD_OUT = 0.02

# The turntable's π0: two cameras of 16 tokens, four query heads on one kv head.
TURNTABLE_PI0 = pi0.Pi0Config(
    depth=18,
    backbone=gemma.GemmaConfig(width=64, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16),
    expert=gemma.GemmaConfig(width=32, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16),
    image=siglip.SiglipConfig(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=12),
    image_size=48,
    vocab_size=448,
    cameras=("base_0_rgb", "left_wrist_0_rgb"),
    action_dim=4,
    action_horizon=10,
    max_token_len=12,
    dtype="float32",
)
# The same as a π0.5; the state's three integers make the prompt longer.
TURNTABLE_PI05 = dataclasses.replace(
    TURNTABLE_PI0, pi05=True, discrete_state_input=True, max_token_len=36
)
# The tabletop's π0: finer images (36 tokens each), a plan of a second, a wider expert.
TABLETOP_PI0 = dataclasses.replace(
    TURNTABLE_PI0,
    backbone=gemma.GemmaConfig(width=64, mlp_dim=192, num_heads=4, num_kv_heads=1, head_dim=16),
    expert=gemma.GemmaConfig(width=48, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16),
    image=siglip.SiglipConfig(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=8),
    action_horizon=20,
    max_token_len=16,
)
# The same with an expert that reads the backbone's last state alone: 18 layers of each.
_READS_LAST = layer_table.reads_last(18, 18)
TABLETOP_LAST = dataclasses.replace(
    TABLETOP_PI0, depth=36, backbone_layers=_READS_LAST[0], expert_layers=_READS_LAST[1]
)
# For one task of the tabletop, which the turntable's sizes are enough for.
AROUND_PI0 = dataclasses.replace(TURNTABLE_PI0, action_horizon=20, max_token_len=16)
# The smallest π0 with all parts; for trials.
DEBUG_PI0 = pi0.Pi0Config(
    depth=4,
    backbone=gemma.GemmaConfig(width=32, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=8),
    expert=gemma.GemmaConfig(width=16, mlp_dim=32, num_heads=4, num_kv_heads=1, head_dim=8),
    image=siglip.SiglipConfig(width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=12),
    image_size=24,
    vocab_size=64,
    cameras=("base_0_rgb", "left_wrist_0_rgb"),
    action_dim=4,
    action_horizon=8,
    max_token_len=8,
    dtype="float32",
)
TURNTABLE_DATA = data_config.DataConfig(robot="turntable", asset_id="turntable", cache="memory")

TABLETOP_DATA = dataclasses.replace(TURNTABLE_DATA, robot="tabletop", asset_id="tabletop")
# Meta-World's π0: two cameras of 64 × 64 pixels, 16 tokens each; 9 MB in bfloat16.
METAWORLD_PI0 = pi0.Pi0Config(
    depth=18,
    backbone=gemma.GemmaConfig(width=128, mlp_dim=320, num_heads=4, num_kv_heads=1, head_dim=32),
    expert=gemma.GemmaConfig(width=64, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=32),
    image=siglip.SiglipConfig(width=128, depth=4, mlp_dim=256, num_heads=4, patch_size=16),
    image_size=64,
    vocab_size=448,
    cameras=("base_0_rgb", "left_wrist_0_rgb"),
    action_dim=4,
    action_horizon=16,
    max_token_len=20,
    dtype="float32",
)
METAWORLD_DATA = data_config.DataConfig(robot="metaworld", asset_id="metaworld", cache="memory")
METAWORLD_TASK = config.ClosedLoopConfig(
    sim="metaworld_mt10",
    demonstrations=1000,
    noise=0.5,
    episodes=100,
    execute_steps=8,
    baselines=False,
)


def turntable_teacher(model: pi0.Pi0Config) -> config.DistillConfig:
    """A teacher trained from scratch with the task loss only."""
    steps = 6000
    return config.DistillConfig(
        model=model,
        data=TURNTABLE_DATA,
        losses=losses.Losses(task=1.0, velocity=0.0, attention=0.0),
        augmentation=observation.NO_AUGMENTATION,
        schedule=optimizer.CosineSchedule.over(steps, 2e-3),
        closed_loop=config.ClosedLoopConfig(demonstrations=3000),
        batch_size=64,
        draws=2,
        num_train_steps=steps,
        save_interval=500,
        keep_period=0,
    )


def tabletop_teacher(model: pi0.Pi0Config) -> config.DistillConfig:
    """A teacher of seven tasks with language instructions, trained on 8,000 demonstrations."""
    steps = 12_000
    return dataclasses.replace(
        turntable_teacher(model),
        data=dataclasses.replace(TABLETOP_DATA, cache="none"),
        schedule=optimizer.CosineSchedule.over(steps, 2e-3),
        closed_loop=config.ClosedLoopConfig(sim="tabletop", demonstrations=8_000, execute_steps=10),
        num_train_steps=steps,
    )


def tabletop_student(
    model: pi0.Pi0Config, teacher: str, demonstrations: int = 400
) -> config.DistillConfig:
    """A student of such a teacher, by three losses in 1,200 steps."""
    steps = 1200
    return dataclasses.replace(
        turntable_student(model, teacher),
        data=TABLETOP_DATA,
        schedule=optimizer.CosineSchedule.over(steps, 2e-3),
        closed_loop=config.ClosedLoopConfig(
            sim="tabletop", demonstrations=demonstrations, seed=1, execute_steps=10
        ),
        num_train_steps=steps,
    )


def turntable_student(model: pi0.Pi0Config, teacher: str) -> config.DistillConfig:
    """A student of the teacher in assets/, which `--teacher.train` retrains."""
    steps = 600
    return config.DistillConfig(
        model=model,
        data=TURNTABLE_DATA,
        teacher=config.TeacherConfig(path=str(ASSETS / teacher), config=teacher),
        student=config.StudentConfig(depth=6),
        losses=losses.Losses(),
        augmentation=observation.NO_AUGMENTATION,
        schedule=optimizer.CosineSchedule.over(steps, 2e-3),
        # Different scenes from the teacher's.
        closed_loop=config.ClosedLoopConfig(demonstrations=800, seed=1),
        batch_size=64,
        draws=2,
        num_train_steps=steps,
        log_interval=20,
        save_interval=100,
        keep_period=0,
    )


def pi05_libero(depth: int) -> config.DistillConfig:
    """openpi's π0.5 of LIBERO with openpi's values, cut to `depth` layers."""
    return config.DistillConfig(
        model=pi0.Pi0Config(pi05=True, action_horizon=10, max_token_len=200),
        data=data_config.DataConfig(
            path=LIBERO, robot="libero", asset_id=LIBERO, held_out=HELD_OUT, num_threads=8
        ),
        teacher=config.TeacherConfig(path=f"{OPENPI}/pi05_libero"),
        student=config.StudentConfig(depth=depth),
        schedule=optimizer.CosineSchedule(warmup_steps=10_000, peak_lr=5e-5, end_lr=5e-5),
        batch_size=256,
        num_train_steps=30_000,
        ema_decay=0.999,
    )


def pi0_aloha() -> config.DistillConfig:
    """openpi's π0 base model on ALOHA with openpi's values, cut to 6 layers; the paper's batch."""
    return config.DistillConfig(
        model=pi0.Pi0Config(),
        data=data_config.DataConfig(
            robot="aloha", asset_id="trossen", held_out=HELD_OUT, num_threads=8
        ),
        teacher=config.TeacherConfig(path=f"{OPENPI}/pi0_base"),
        student=config.StudentConfig(depth=6),
        batch_size=64,
        num_train_steps=30_000,
    )


def fast(whole: config.DistillConfig, num_steps: int) -> config.DistillConfig:
    """A full-size experiment with the cuts that cost least together (docs/student_shapes.md).

    Fewer integration steps than ten are taught by reflow, beside the other losses.
    """
    student = whole.student
    student = dataclasses.replace(student, vision_depth=14, image_tokens=64, num_steps=num_steps)
    reflow = dataclasses.replace(whole.losses, reflow=float(num_steps < 10))
    return dataclasses.replace(whole, student=student, losses=reflow)
