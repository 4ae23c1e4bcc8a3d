"""The step of distillation that most of these tests start from."""

import jax
import optax
import pytest

from shallow_pi.distill import layer_map, losses, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.models import pi0
from shallow_pi.models.layers import Execution


@pytest.fixture(scope="session")
def setting(tiny_config, tiny_params, tiny_batch):
    """Its spec, teacher, state and batch: layers 0 and 2 of three, moved off the teacher's; all
    three losses; plain SGD, whose updates are −0.1 times the gradient.
    """
    config = tiny_config(cameras=("base_0_rgb",))
    layers = layer_map.explicit((0, 2), 3)
    spec = specs.Spec(
        student=pi0.at_depth(config, 2),
        optimizer=optax.sgd(0.1),
        schedule=optax.constant_schedule(0.1),
        losses=losses.Losses(task=1.0, velocity=0.5, attention=2.0),
        teacher=config,
        layer_map=layers,
        execution=Execution(remat="none"),
    )

    @jax.jit
    def start(teacher, others):
        cut = student.cut(config, teacher, layers)
        moved = jax.tree.map(lambda x, y: x + 0.1 * y, cut, others)
        return step.init_state(spec, moved)

    teacher = tiny_params(config)
    return spec, teacher, start(teacher, tiny_params(spec.student, seed=3)), tiny_batch(config, b=8)
