"""The turntable's MuJoCo scene: a disc with blocks and cups, and a gantry that carries a peg.

Metres; the disc's top is z = 0 and the gantry's three slides read the peg's tip in world
coordinates. Positions and colours of the objects are set for each episode in the compiled model.
What is seen and what collides are separate geoms for cups: a ring of boxes collides (group 3, never
drawn), a cylinder with a dark lid in place of the hole is drawn, and the lid hides whatever is
inside the hole.
"""

import numpy as np

DISC_RADIUS = 0.15
BLOCK_HALF = 0.013  # of a block's width; its height is 2 · BLOCK_HALF
CUP_RADIUS = 0.018  # outer
CUP_HEIGHT = 0.030
PEG_RADIUS = 0.006
CUP_WALLS = 12
REACH = np.array([[-0.16, -0.16, 0.002], [0.16, 0.16, 0.15]])  # the tip's workspace, low and high
SERVO_STIFFNESS = 1000.0  # N/m
SERVO_DAMPING = 40.0  # N·s/m

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.05, 0.05),
    "green": (0.05, 0.65, 0.15),
    "blue": (0.05, 0.20, 0.95),
    "yellow": (1.00, 0.95, 0.05),
    "purple": (0.60, 0.10, 0.80),
    "orange": (1.00, 0.50, 0.00),
}


def _camera(name: str, position: tuple[float, ...], target: tuple[float, ...], fovy: float) -> str:
    """A camera in the plane x = 0 that looks at `target`, its x axis along the world's."""
    back = np.subtract(position, target)
    up = np.cross(back / np.linalg.norm(back), (1.0, 0.0, 0.0))
    place = " ".join(f"{p:.6f}" for p in position)
    return (
        f'<camera name="{name}" pos="{place}" fovy="{fovy}" '
        f'xyaxes="1 0 0 {up[0]:.6f} {up[1]:.6f} {up[2]:.6f}"/>'
    )


def _block(index: int) -> str:
    half = BLOCK_HALF
    return (
        f'<body name="block{index}" pos="0 0 {half}">'
        f'<geom name="block{index}" class="target" type="box" size="{half} {half} {half}"/></body>'
    )


def _cup(index: int, hole: float) -> str:
    wall = (CUP_RADIUS - hole) / 2
    ring = hole + wall
    width = np.tan(np.pi / CUP_WALLS) * (ring + wall)
    half = CUP_HEIGHT / 2
    walls = "".join(
        f'<geom class="target" type="box" group="3" size="{wall:.6f} {width:.6f} {half}" '
        f'pos="{ring * np.cos(a):.6f} {ring * np.sin(a):.6f} 0" euler="0 0 {a:.6f}"/>'
        for a in 2 * np.pi * np.arange(CUP_WALLS) / CUP_WALLS
    )
    return (
        f'<body name="cup{index}" pos="0 0 {half}">{walls}'
        f'<geom name="cup{index}" class="seen" type="cylinder" size="{CUP_RADIUS} {half}"/>'
        f'<geom class="seen" type="cylinder" size="{hole} {half + 0.0003}" rgba=".06 .06 .06 1"/>'
        "</body>"
    )


def xml(num_blocks: int, num_cups: int, hole: float, timestep: float, fixtures: str = "") -> str:
    """The scene as MJCF, with bodies `block0…` and `cup0…` on the disc.

    `hole` is the radius of a cup's hole in metres, `timestep` is in seconds, and `fixtures` is the
    MJCF of further bodies on the disc.
    """
    blocks = "".join(_block(i) for i in range(num_blocks))
    cups = "".join(_cup(i, hole) for i in range(num_cups))
    base = _camera("base", (0, -0.27, 0.42), (0, -0.003, 0.01), 37)
    wrist = _camera("wrist", (0, -0.075, 0.080), (0, 0, -0.012), 46)
    low, high = REACH
    slides = {
        axis: f'type="slide" axis="{vector}" range="{low[i]} {high[i]}"'
        for i, (axis, vector) in enumerate({"x": "1 0 0", "y": "0 1 0", "z": "0 0 1"}.items())
    }
    carriage = '<inertial pos="0 0 0" mass=".12" diaginertia=".001 .001 .001"/>'
    servos = "".join(
        f'<position name="{axis}" joint="{axis}" kp="{SERVO_STIFFNESS}" forcerange="-12 12"/>'
        for axis in slides
    )
    return f"""
<mujoco model="turntable">
  <compiler angle="radian"/>
  <option timestep="{timestep!r}" integrator="implicitfast"/>
  <visual><quality shadowsize="0" offsamples="4"/></visual>
  <default>
    <geom friction=".3 .005 .0001"/>
    <joint damping="{SERVO_DAMPING}" limited="false"/>
    <default class="target"><geom contype="0" conaffinity="1" mass="0"/></default>
    <default class="seen"><geom contype="0" conaffinity="0" mass="0"/></default>
  </default>
  <worldbody>
    <light pos=".35 -.45 .82" dir="-.35 .45 -.82" directional="true" castshadow="false"/>
    {base}
    <geom name="table" class="seen" type="box" size=".6 .6 .01" pos="0 0 -.035"
          rgba=".30 .32 .35 1"/>
    <body name="disc">
      <joint name="disc" type="hinge" axis="0 0 1" damping="0" armature=".05"/>
      <geom name="disc" type="cylinder" size="{DISC_RADIUS} .01" pos="0 0 -.01" mass="1"
            contype="0" conaffinity="1" rgba=".85 .83 .80 1"/>
      {fixtures}{blocks}{cups}
    </body>
    <body name="gantry_x" gravcomp="1"><joint name="x" {slides["x"]}/>{carriage}
      <body name="gantry_y" gravcomp="1"><joint name="y" {slides["y"]}/>{carriage}
        <body name="peg" gravcomp="1"><joint name="z" {slides["z"]}/>
          {wrist}
          <geom name="peg" type="capsule" size="{PEG_RADIUS}" fromto="0 0 {PEG_RADIUS} 0 0 .05"
                mass=".10" contype="1" conaffinity="0" rgba=".12 .12 .14 1"/>
          <site name="tip"/>
          <body name="rod"><geom class="seen" type="capsule" size=".003"
            fromto="0 0 .05 0 0 .30" rgba=".45 .45 .50 1"/></body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    {servos}
    <velocity name="disc" joint="disc" kv="50"/>
  </actuator>
</mujoco>"""
