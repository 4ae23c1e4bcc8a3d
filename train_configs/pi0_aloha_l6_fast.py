"""openpi's π0 base model on ALOHA, 18 → 6 layers and cut further: 47 ms predicted on an AGX Orin.

uv run scripts/train_distill.py pi0_aloha_l6_fast --data.path FOLDER --exp-name first
As pi0_aloha_l6, with half of the image tower (and a loss on its tokens), a quarter of the image
tokens, and two integration steps by reflow. Predicted times are 47 ms on an AGX Orin and 2.8 on an
H200, down from 112 and 7.5. Two steps cost most where there are several ways to act; with ten
(--student.num-steps 10 --losses.reflow 0) the predictions are 59 and 4.7 ms. docs/student_shapes.md
shows what each cut costs, and other budgets. Not run at full size yet."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """openpi's values, and the fast student."""
    return _base.fast(_base.pi0_aloha(), num_steps=2)
