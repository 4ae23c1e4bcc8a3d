"""Images of a MuJoCo model, by ray casting or by MuJoCo's OpenGL renderer."""

from collections.abc import Sequence
from typing import Literal

import mujoco
import numpy as np
from jaxtyping import UInt8

from shallow_pi.sims import raycast

Renderer = Literal["ray", "gl"]
_UNPAINTED = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # MuJoCo's colour of a geom without one.


def check(renderer: str) -> None:
    """Raise a ValueError for an unknown renderer."""
    if renderer not in ("ray", "gl"):
        raise ValueError(f'renderer: expected "ray" or "gl", got {renderer!r}')


class Images:
    """Images of one model by its named cameras.

    Ray casting (see `raycast.RayCamera`) needs no graphics library, and draws neither shadows nor
    sites that are not named; OpenGL draws all sites, and, with `shadows`, shadows, reflections and
    smooth edges as the scene's file says, which on a CPU takes ten times as long.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        size: tuple[int, int],
        renderer: Renderer,
        grid: int = 3,
        sites: Sequence[int] = (),
        groups: Sequence[int] = raycast.VISIBLE_GROUPS,
        shadows: bool = True,
    ):
        self._shadows = shadows
        self._model, self._size, self._renderer = model, size, renderer
        self._grid, self._sites, self._groups = grid, tuple(sites), tuple(groups)
        self._cameras: dict[str, raycast.RayCamera] = {}
        self._gl: mujoco.Renderer | None = None

    def render(
        self, data: mujoco.MjData, camera: str, light: raycast.Light = raycast.LIGHT
    ) -> UInt8[np.ndarray, "h w 3"]:
        """One camera's image; `data` must hold current kinematics.

        Raises:
          ValueError: there is no OpenGL here.
        """
        if self._renderer == "gl":
            return self._render_gl(data, camera)
        if camera not in self._cameras:
            self._cameras[camera] = raycast.RayCamera(
                self._model, camera, *self._size, self._grid, self._sites, self._groups
            )
        return self._cameras[camera].render(data, light)

    def _render_gl(self, data: mujoco.MjData, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        if self._gl is None:
            quality, buffer = self._model.vis.quality, self._model.vis.global_
            if not self._shadows:
                quality.offsamples = quality.shadowsize = 0
            buffer.offheight = max(buffer.offheight, self._size[0])
            buffer.offwidth = max(buffer.offwidth, self._size[1])
            try:
                self._gl = mujoco.Renderer(self._model, *self._size)
            except Exception as error:  # each backend fails in its own way
                raise ValueError(no_gl(error)) from error
        self._gl.update_scene(data, camera)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._gl.scene.flags[flag] = self._shadows
        return self._gl.render()

    def close(self) -> None:
        """Free the OpenGL renderer: two at once can give black images."""
        if self._gl is not None:
            self._gl.close()
            self._gl = None


def paint(model: mujoco.MjModel) -> None:
    """Give each geom the colour of its material, times its texture's mean."""
    for geom, material in enumerate(model.geom_matid):
        if material < 0:
            continue
        # As MuJoCo draws it: a colour of the geom's own goes before its material's.
        own = model.geom_rgba[geom]
        colour = model.mat_rgba[material] if np.array_equal(own, _UNPAINTED) else own.copy()
        for texture in np.ravel(model.mat_texid[material]):
            if texture >= 0:
                start, channels = model.tex_adr[texture], model.tex_nchannel[texture]
                count = model.tex_height[texture] * model.tex_width[texture]
                data = model.tex_data[start : start + count * channels].reshape(count, channels)
                colour[:3] = colour[:3] * data[:, :3].mean(0) / 255
                break
        model.geom_rgba[geom] = colour


def no_gl(error: BaseException, otherwise: str = 'or use renderer="ray"') -> str:
    """The message for a machine on which no OpenGL backend works."""
    return (
        f'renderer="gl" needs an OpenGL backend and none works here ({error}); install one '
        "(Debian: libegl1 or libosmesa6) and set MUJOCO_GL to egl or osmesa before the start, "
        f"{otherwise}"
    )
