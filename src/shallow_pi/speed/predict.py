"""Predict the time of one inference on a device that is not here, with the arithmetic shown.

Each part is bound by its products or by its weights, at the share of the device's rate that our
program reached on an H200, and every layer of a step adds the time its small kernels took there:

    image tower   operations / (rate · 0.23)
    prefix        operations / (rate · 0.76)
    one step      max(operations / rate, weights / bandwidth) / 0.76 + layers · 27.6 µs

They come from a trace of 6 layers of π0.5 with two cameras, in an earlier version: 2.44 ms, 1.35 ms
and 0.23 ms. The floor is the same without shares and kernels: no program is faster.
"""

import dataclasses
from collections.abc import Mapping

from shallow_pi.inference import tuning
from shallow_pi.models import pi0
from shallow_pi.speed import flops

TOWER, PRODUCTS, LAYER_SECONDS = 0.2285, 0.76, 27.6e-6


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates of a device in 16-bit floats."""

    name: str
    # Dense operations a second, and bytes a second from its memory.
    flops: float
    bandwidth: float
    # Measured in large products and copies; else its maker's numbers.
    is_measured: bool = False


DEVICES: Mapping[str, Device] = {
    # A GPU's part of the sparse 8-bit operations that are advertised, quartered.
    "orin-agx": Device("Jetson AGX Orin 64 GB", 42.5e12, 204.8e9),
    "orin-nx": Device("Jetson Orin NX 16 GB", 15e12, 102.4e9),
    # An eighth of the sparse 4-bit operations.
    "thor": Device("Jetson Thor T5000", 258e12, 273e9),
    "4090": Device("GeForce RTX 4090", 165e12, 1008e9),
    "h100": Device("H100 SXM", 798e12, 3.0e12, is_measured=True),
    "h200": Device("H200 SXM", 790e12, 4.24e12, is_measured=True),
}
# Milliseconds that the paper reports for its student on these boards.
PAPER = {"orin-agx": 110.0, "thor": 78.0}


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of an inference: milliseconds as expected and at least, and how they come about."""

    name: str
    expected: float
    floor: float
    arithmetic: str


def parts(config: pi0.Pi0Config, device: Device, num_steps: int = 10) -> list[Part]:
    """The parts of one inference with this config's cameras and prompt length, in 16-bit floats."""
    small = dataclasses.replace(config, dtype="float16")
    count = flops.inference_flops(small, num_steps=num_steps, options=tuning.ALL_ON)
    weights = flops.weight_bytes(small, num_steps=num_steps, options=tuning.ALL_ON)
    tera, giga = device.flops / 1e12, device.bandwidth / 1e9

    def once(name: str, operations: int, size: int, share: float) -> Part:
        floor = 1e3 * max(operations / device.flops, size / device.bandwidth)
        text = f"max({operations / 1e12:.3f} TFLOP / {tera:g} TFLOP/s, {size / 1e9:.2f} GB / "
        return Part(name, floor / share, floor, f"{text}{giga:g} GB/s) / {share:.2f}")

    operations, size = count.step, weights.step
    layers = sum(kind.expert == "whole" for kind in config.layers)
    floor = 1e3 * max(operations / device.flops, size / device.bandwidth)
    step = Part(
        f"{num_steps} steps",
        num_steps * (floor / PRODUCTS + 1e3 * layers * LAYER_SECONDS),
        num_steps * floor,
        f"{num_steps} · (max({operations / 1e12:.4f} TFLOP / {tera:g} TFLOP/s, {size / 1e9:.3f} GB "
        f"/ {giga:g} GB/s) / {PRODUCTS:.2f} + {layers} layers · {1e6 * LAYER_SECONDS:.1f} µs)",
    )
    return [
        once("image tower", count.vision, weights.vision, TOWER),
        once("prefix", count.prefix, weights.prefix, PRODUCTS),
        step,
    ]


def table(config: pi0.Pi0Config, device: str, num_steps: int = 10) -> list[str]:
    """The prediction for a device of `DEVICES`, line by line.

    Raises:
      ValueError: an unknown device.
    """
    if device not in DEVICES:
        raise ValueError(f"unknown --device {device!r}: there are {', '.join(DEVICES)}")
    chosen = DEVICES[device]
    found = parts(config, chosen, num_steps)
    kind = "measured" if chosen.is_measured else "as its maker states them"
    lines = [
        f"{config.kind}, {config.depths}, {len(config.cameras)} cameras, "
        f"{config.max_token_len} prompt tokens, horizon {config.action_horizon}, 16-bit floats",
        f"{chosen.name}: {chosen.flops / 1e12:g} TFLOP/s, {chosen.bandwidth / 1e9:g} GB/s ({kind})",
        "",
        f"{'':12} {'expected':>9} {'floor':>8}   ms",
    ]
    lines += [f"{p.name:12} {p.expected:9.2f} {p.floor:8.2f}   {p.arithmetic}" for p in found]
    whole = [sum(p.expected for p in found), sum(p.floor for p in found)]
    lines.append(f"{'whole':12} {whole[0]:9.2f} {whole[1]:8.2f}   predicted, not measured")
    if device in PAPER and config.backbone.width == pi0.Pi0Config().backbone.width:
        lines.append(f"{'paper':12} {PAPER[device]:9.2f}            measured by its authors, L6")
    return lines
