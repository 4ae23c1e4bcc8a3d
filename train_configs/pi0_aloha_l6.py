"""openpi's π0 base model on ALOHA, 18 → 6 layers, at full size.

uv run scripts/train_distill.py pi0_aloha_l6 --data.path FOLDER --exp-name first
Teacher: gs://openpi-assets/checkpoints/pi0_base (about 6.5 GB in bfloat16), downloaded once.
Better: a policy fine-tuned on the same data with openpi's pi0_aloha_pen_uncap (--teacher.path
STEP). Data: a LeRobot dataset of a bimanual ALOHA with three cameras at 50 Hz. Joint signs, gripper
angles, delta actions, horizon 50, prompt of 48 tokens and the statistics (trossen) are openpi's.
Warm-up to 2.5e-5 in 1,000 steps, cosine to 2.5e-6 at 30,000. Validation on 2 % of the episodes. Not
run at full size yet; one 80 GB device or more, see --mesh."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """openpi's sizes and schedule; the paper's batch of 64."""
    return _base.pi0_aloha()
