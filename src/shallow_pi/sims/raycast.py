"""Images of a MuJoCo scene by ray casting: no GL, no display, no system package.

One ray goes through every pixel corner, and a pixel's colour is the mean over its four corners,
so that neighbouring pixels share rays. Pixels whose corners do not all hit the same geom are cast
again with a grid of rays inside the pixel: edges are anti-aliased, and positions can be read to a
fraction of a pixel. A surface has its geom's colour times
ambient + (1 − ambient)·max(0, normal · light).

`mj_multiRay` skips a body whose colliding geoms the ray passes far by: a geom that is only seen
must lie within its body's colliding geoms, or in a body that has none.
"""

import dataclasses
from collections.abc import Sequence

import mujoco
import numpy as np
from jaxtyping import Float, Int, UInt8

BACKGROUND = (0.55, 0.62, 0.70)
VISIBLE_GROUPS = (1, 1, 1, 0, 0, 0)  # as in MuJoCo's own viewer


@dataclasses.dataclass(frozen=True)
class Light:
    """One directional light and the share of light that comes from everywhere."""

    towards: tuple[float, float, float] = (0.35, -0.45, 0.82)
    ambient: float = 0.45


LIGHT = Light()


class RayCamera:
    """A named camera of `model`, fixed or carried by a body, that renders uint8 images."""

    def __init__(
        self,
        model: mujoco.MjModel,
        camera: str,
        height: int = 48,
        width: int = 48,
        grid: int = 3,
        sites: Sequence[int] = (),
        groups: Sequence[int] = VISIBLE_GROUPS,
    ):
        """Prepare the ray directions; the scene's colours are read anew for every image.

        `grid` is the number of rays along each side of a pixel that shows an edge, `sites` are ids
        of sites to draw as spheres of their radius, and `groups` has 1 for each of the six groups
        of geoms to draw.
        """
        self._groups = np.array(groups, np.uint8)
        self._model, self._sites = model, tuple(sites)
        self._id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if self._id < 0:
            names = [model.camera(i).name for i in range(model.ncam)]
            raise ValueError(f"the scene has no camera {camera!r}; it has {names}")
        self.height, self.width = height, width
        self._corners = self._rays(np.arange(width + 1.0), np.arange(height + 1.0))
        inside = (np.arange(grid) + 0.5) / grid
        columns = (np.arange(width)[:, None] + inside).ravel()
        rows = (np.arange(height)[:, None] + inside).ravel()
        fine = self._rays(columns, rows).reshape(height, grid, width, grid, 3)
        self._fine = fine.transpose(0, 2, 1, 3, 4).reshape(height, width, grid * grid, 3)

    def _rays(
        self, columns: Float[np.ndarray, " w"], rows: Float[np.ndarray, " h"]
    ) -> Float[np.ndarray, "h w 3"]:
        """Unit directions in the camera's frame (x right, y up, looking along −z)."""
        half = np.tan(np.deg2rad(self._model.cam_fovy[self._id]) / 2)
        x = half * (2 * columns - self.width) / self.height
        y = half * (1 - 2 * rows / self.height)
        rays = np.stack([*np.meshgrid(x, y), np.full((len(y), len(x)), -1.0)], -1)
        return rays / np.linalg.norm(rays, axis=-1, keepdims=True)

    def cast(
        self, data: mujoco.MjData, rays: Float[np.ndarray, "n 3"]
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"], Float[np.ndarray, "n 3"]]:
        """Cast unit rays given in the camera's frame.

        Returns the geom hit (−1: none), the distance along the ray in metres (−1: none) and the
        surface's normal in the world's frame.
        """
        count = len(rays)
        geom = np.empty(count, np.int32)
        distance = np.empty(count)
        normal = np.empty(3 * count)
        world = rays @ data.cam_xmat[self._id].reshape(3, 3).T
        mujoco.mj_multiRay(
            self._model,
            data,
            data.cam_xpos[self._id],
            world.ravel(),
            self._groups,
            1,  # static geoms are visible too
            -1,  # no body is left out
            geom,
            distance,
            normal,
            count,
            mujoco.mjMAXVAL,
        )
        return geom, distance, normal.reshape(count, 3)

    def _shade(
        self, data: mujoco.MjData, rays: Float[np.ndarray, "n 3"], source: Light
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n 3"]]:
        geom, distance, normal = self.cast(data, rays)
        for i, site in enumerate(self._sites):
            near, outward = self._cast_sphere(data, rays, site)
            seen = (near > 0) & ((geom < 0) | (near < distance))
            geom[seen], distance[seen] = self._model.ngeom + i, near[seen]
            normal[seen] = outward[seen]
        towards = np.array(source.towards) / np.linalg.norm(source.towards)
        sites = self._model.site_rgba[list(self._sites), :3]
        colours = np.concatenate([self._model.geom_rgba[:, :3], sites, [BACKGROUND]])
        light = source.ambient + (1 - source.ambient) * np.maximum(normal @ towards, 0.0)
        light[geom < 0] = 1.0
        return geom, colours[geom] * light[:, None]

    def _cast_sphere(
        self, data: mujoco.MjData, rays: Float[np.ndarray, "n 3"], site: int
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n 3"]]:
        """Distances to a site's sphere (−1: missed) and normals in the world's frame."""
        world = rays @ data.cam_xmat[self._id].reshape(3, 3).T
        away = data.cam_xpos[self._id] - data.site_xpos[site]
        half = world @ away
        root = half**2 - away @ away + self._model.site_size[site, 0] ** 2
        distance = np.where(root > 0, -half - np.sqrt(np.maximum(root, 0)), -1.0)
        normal = away + distance[:, None] * world
        return distance, normal / np.linalg.norm(normal, axis=1, keepdims=True)

    def render(self, data: mujoco.MjData, light: Light = LIGHT) -> UInt8[np.ndarray, "h w 3"]:
        """An image of the current pose; `data` must hold current kinematics (`mj_forward`)."""
        shape = (self.height + 1, self.width + 1)
        geom, colour = self._shade(data, self._corners.reshape(-1, 3), light)
        geom, colour = geom.reshape(shape), colour.reshape(*shape, 3)
        corners = (np.s_[:-1, :-1], np.s_[:-1, 1:], np.s_[1:, :-1], np.s_[1:, 1:])
        image = np.mean([colour[c] for c in corners], axis=0)
        first = geom[corners[0]]
        edge = (
            (first != geom[corners[1]]) | (first != geom[corners[2]]) | (first != geom[corners[3]])
        )
        if edge.any():
            rays = self._fine[edge]
            _, fine = self._shade(data, rays.reshape(-1, 3), light)
            image[edge] = fine.reshape(*rays.shape).mean(1)
        return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
