"""A small policy's assets and parameters."""

import numpy as np
import pytest

from shallow_pi.data import assets, normalize, robots


@pytest.fixture(scope="module")
def own(tiny_config, tiny_dataset):
    ramp = np.linspace(0.5, 2, 3)
    stats = normalize.NormStats(mean=ramp, std=ramp + 1, q01=-ramp, q99=ramp)
    model = tiny_config(depth=2, vocab_size=320)
    both = {"state": stats, "actions": stats}
    return assets.Assets(model, robots.TURNTABLE, tiny_dataset[1], both, "turntable")


@pytest.fixture(scope="module")
def params(own, tiny_params):
    return tiny_params(own.model)
