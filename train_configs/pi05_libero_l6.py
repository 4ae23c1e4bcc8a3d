"""openpi's π0.5 of LIBERO, 18 → 6 layers, at full size.

uv run scripts/train_distill.py pi05_libero_l6 --exp-name first
Teacher: gs://openpi-assets/checkpoints/pi05_libero. Data: physical-intelligence/libero, two cameras
at 10 Hz; fetched (uv sync --extra hf) or given by --data.path. As in openpi: third camera masked,
actions as recorded, no state in the prompt, horizon 10, prompt of 200 tokens, batch of 256, warm-up
to a constant 5e-5 in 10,000 of 30,000 steps, moving average 0.999. Not run at full size yet; eight
80 GB devices (--mesh.fsdp 8), or fewer with --accumulation."""

import _base

from shallow_pi.models import pi0
from shallow_pi.training import batches, config, optimizer

DATASET = "physical-intelligence/libero"


def get_config() -> config.DistillConfig:
    """openpi's values."""
    return config.DistillConfig(
        name="pi05_libero_l6",
        model=pi0.Pi0Config(pi05=True, action_horizon=10, max_token_len=200),
        data=batches.DataConfig(path=DATASET, robot="libero", asset_id=DATASET, num_threads=8),
        teacher=config.TeacherConfig(path=f"{_base.OPENPI}/pi05_libero"),
        student=config.StudentConfig(depth=6),
        schedule=optimizer.CosineSchedule(warmup_steps=10_000, peak_lr=5e-5, end_lr=5e-5),
        batch_size=256,
        num_train_steps=30_000,
        ema_decay=0.999,
    )
