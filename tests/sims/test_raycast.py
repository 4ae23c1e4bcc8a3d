import mujoco
import numpy as np
import pytest

from shallow_pi.sims import raycast

# The camera looks straight down from 1 m; 90° over 20 pixels is 0.1 m a pixel at z = 0.
SCENE = """
<mujoco><worldbody>
  <camera name="top" pos="0 0 1" fovy="90"/>
  <geom name="box" type="box" size=".4 .2 .1" pos="-.5 .5 -.1" rgba="1 .5 0 1"/>
  <geom name="ball" type="sphere" size=".1" pos="0 0 0" rgba="0 0 1 1"/>
  <geom name="hidden" type="box" size="9 9 .01" pos="0 0 .5" group="3"/>
</worldbody></mujoco>"""


def _camera(scene: str = SCENE) -> tuple[raycast.RayCamera, mujoco.MjData]:
    model = mujoco.MjModel.from_xml_string(scene)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return raycast.RayCamera(model, "top", 20, 20), data


def _shaded(rgb: tuple[float, ...], normal: tuple[float, ...]) -> np.ndarray:
    source = raycast.LIGHT
    towards = np.array(source.towards) / np.linalg.norm(source.towards)
    light = source.ambient + (1 - source.ambient) * max(0.0, float(towards @ normal))
    return np.rint(255 * light * np.array(rgb))


def test_rays_hit_what_geometry_says():
    camera, data = _camera()
    slant = np.array([-0.5, 0.5, -1.0])
    rays = np.stack([[0.0, 0.0, -1.0], slant / np.linalg.norm(slant), [0.0, 0.0, 1.0]])
    geom, distance, normal = camera.cast(data, rays)
    assert [data.geom(int(g)).name for g in geom[:2]] == ["ball", "box"]
    assert geom[2] == -1
    np.testing.assert_allclose(distance, [0.9, np.sqrt(1.5), -1.0], atol=1e-9)
    np.testing.assert_allclose(normal[:2], [[0, 0, 1], [0, 0, 1]], atol=1e-9)


def test_image_has_the_geoms_colour_where_they_are():
    camera, data = _camera()
    image = camera.render(data).astype(float)
    assert image.shape == (20, 20, 3)
    # The box covers x in (-.9, -.1), y in (.3, .7): columns 1 to 8, rows 3 to 6 from the top.
    expected = np.broadcast_to(_shaded((1.0, 0.5, 0.0), (0, 0, 1)), (4, 8, 3))
    np.testing.assert_allclose(image[3:7, 1:9], expected, atol=1)
    background = np.rint(255 * np.array(raycast.BACKGROUND))
    np.testing.assert_allclose(image[15, 15], background, atol=1)
    np.testing.assert_allclose(image[4, 12], background, atol=1)
    assert image[9:11, 9:11, 2].min() > 100 > image[9:11, 9:11, 0].max()


def test_pixel_on_an_edge_mixes_by_the_area_covered():
    # The box's right edge moves to x = -.0667: a third of the pixel of column 9.
    camera, data = _camera(SCENE.replace(".4 .2 .1", ".43333333 .2 .1"))
    image = camera.render(data).astype(float)
    inside, outside = _shaded((1.0, 0.5, 0.0), (0, 0, 1)), 255 * np.array(raycast.BACKGROUND)
    np.testing.assert_allclose(image[5, 9], inside / 3 + outside * 2 / 3, atol=2)


def test_image_follows_the_camera_and_the_light():
    camera, data = _camera()
    data.cam_xpos[0] += [0.3, 0.0, 0.0]  # everything moves three pixels to the left
    moved = camera.render(data)
    assert moved[10, 6, 2] > 100 > moved[10, 6, 0]
    ball = camera.cast(data, np.array([[-0.3, 0, -1]]) / np.sqrt(1.09))
    assert data.geom(int(ball[0][0])).name == "ball"


def test_unknown_camera_is_named_with_the_known_ones():
    model = mujoco.MjModel.from_xml_string(SCENE)
    with pytest.raises(ValueError, match=r"no camera 'side'.*\['top'\]"):
        raycast.RayCamera(model, "side")
