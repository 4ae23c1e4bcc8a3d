"""openpi's π0.5 for LIBERO, 18 → 6 layers, at full size.

uv run scripts/train_distill.py pi05_libero_l6 --exp-name first
Teacher: gs://openpi-assets/checkpoints/pi05_libero. Data: physical-intelligence/libero, two cameras
at 10 Hz; downloaded (uv sync --extra hf), or --data.path. As in openpi: third camera masked,
actions as recorded, no state in the prompt, horizon 10, prompt of 200 tokens, batch of 256, warm-up
to a constant 5e-5 in 10,000 of 30,000 steps, moving average 0.999. Validation on 2 % of the
episodes. Not run at full size yet; eight 80 GB devices (--mesh.fsdp 8), or fewer with
--accumulation."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """openpi's values."""
    return _base.pi05_libero(depth=6)
