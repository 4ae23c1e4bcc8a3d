"""The accelerator table: memory, matrix rate and link bandwidth as stated by the manufacturers."""

import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """The stated numbers of one device."""

    # JAX's name for it, as a regular expression.
    kind: str
    # Bytes.
    memory: int
    # Dense bfloat16 operations a second.
    flops: float
    # Bytes a second to and from other devices, both directions together; 0 for PCIe only.
    links: float = 0.0


GB, GIB, TERA = 10**9, 2**30, 1e12
# The first match counts. An H100 without "PCIe" in its name is the SXM module.
TABLE = {
    "h100-pcie": Accelerator(r".*H100.*PCIe.*", 80 * GB, 756 * TERA),
    "h100": Accelerator(r".*H100.*", 80 * GB, 989 * TERA, 900 * GB),
    "h200": Accelerator(r".*H200.*", 141 * GB, 989 * TERA, 900 * GB),
    "a100-40": Accelerator(r".*A100.*40GB.*", 40 * GB, 312 * TERA, 600 * GB),
    "a100": Accelerator(r".*A100.*", 80 * GB, 312 * TERA, 600 * GB),
    "l40s": Accelerator(r".*L40S.*", 48 * GB, 362 * TERA),
    "rtx4090": Accelerator(r".*RTX 4090", 24 * GB, 165 * TERA),
    "v5e": Accelerator(r"TPU v5( lite|e)", 16 * GIB, 197 * TERA, 200 * GB),
    "v5p": Accelerator(r"TPU v5p?", 95 * GIB, 459 * TERA, 600 * GB),
    "v6e": Accelerator(r"TPU v6( lite|e)", 32 * GIB, 918 * TERA, 448 * GB),
}


def find(device_kind: str) -> Accelerator | None:
    """The accelerator of this JAX device kind; None if the table lacks it."""
    for accelerator in TABLE.values():
        if re.fullmatch(accelerator.kind, device_kind, re.IGNORECASE):
            return accelerator
    return None


def memory_of(device: jax.Device) -> int | None:
    """Bytes of memory as the device reports them, else from the table; None if neither knows."""
    try:
        reported = device.memory_stats() or {}
    except (NotImplementedError, RuntimeError, jax.errors.JaxRuntimeError):
        reported = {}  # An absent device of a topology.
    if reported.get("bytes_limit"):
        return int(reported["bytes_limit"])
    found = find(device.device_kind)
    return found.memory if found else None
