"""Images by OpenGL are those that published policies were trained on."""

import sys

import mujoco
import numpy as np
import pytest

from shallow_pi.sims import images, simulator


@pytest.fixture
def egl(monkeypatch):
    """Draws with EGL, whatever MUJOCO_GL was when MuJoCo was imported."""
    try:
        from mujoco.egl import GLContext
    except (AttributeError, ImportError) as error:
        pytest.skip(f"no EGL: {error}")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    module = sys.modules[mujoco.Renderer.__module__]
    monkeypatch.setattr(module.gl_context, "GLContext", GLContext, raising=False)


def test_alohas_have_shadows_and_smooth_edges(egl):
    pytest.importorskip("gym_aloha", reason="needs the extra aloha-sim")
    sim = simulator.find("aloha_transfer_cube", {"height": 48}).make()
    sim.reset(0)
    found = sim.observe()["observation.images.top"]
    sim._images.close()
    with mujoco.Renderer(sim.model, 48, 64) as own:
        own.update_scene(sim.data, "top")
        np.testing.assert_array_equal(found, own.render())
    plain = images.Images(sim.model, (48, 64), "gl", shadows=False)
    assert np.abs(found.astype(int) - plain.render(sim.data, "top")).mean() > 0.5
    plain.close()


def test_metaworlds_are_lerobots(egl):
    pytest.importorskip("metaworld", reason="needs the extra metaworld")
    options = {"tasks": "reach", "view": "corner2", "renderer": "gl", "image_size": 48}
    sim = simulator.find("metaworld_mt10", options).make()
    sim.reset(0)
    found = sim.observe()["observation.images.base"]
    sim._images.close()
    model = sim._env.model
    model.camera("corner2").pos = (0.75, 0.075, 0.7)  # LeRobot's.
    with mujoco.Renderer(model, 48, 48) as own:
        own.update_scene(sim._env.data, "corner2")
        np.testing.assert_array_equal(found, own.render()[::-1, ::-1])


def test_an_image_may_be_larger_than_the_scenes_file_provides_for(egl):
    sim = simulator.find("turntable", {"renderer": "gl", "image_size": 700}).make()
    sim.reset(0)
    assert sim.observe()["observation.images.base"].shape == (700, 700, 3)
    sim._images[id(sim.bench)].close()
