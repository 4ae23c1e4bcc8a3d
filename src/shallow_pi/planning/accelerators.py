"""What the makers of accelerators state of them: memory, matrix rate, traffic between devices."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Card:
    """One device."""

    # What JAX calls it, as a regular expression.
    kind: str
    memory: int
    # Dense bfloat16 operations a second.
    flops: float
    # Bytes a second to and from its neighbours at once (half of them each way); 0 is PCIe's.
    links: float = 0.0


GB, GIB, TERA = 10**9, 2**30, 1e12
# The first whose kind matches is meant. An H100 without "PCIe" is taken for the SXM module.
CARDS = {
    "h100-pcie": Card(r".*H100.*PCIe.*", 80 * GB, 756 * TERA),
    "h100": Card(r".*H100.*", 80 * GB, 989 * TERA, 900 * GB),
    "h200": Card(r".*H200.*", 141 * GB, 989 * TERA, 900 * GB),
    "a100-40": Card(r".*A100.*40GB.*", 40 * GB, 312 * TERA, 600 * GB),
    "a100": Card(r".*A100.*", 80 * GB, 312 * TERA, 600 * GB),
    "l40s": Card(r".*L40S.*", 48 * GB, 362 * TERA),
    "rtx4090": Card(r".*RTX 4090", 24 * GB, 165 * TERA),
    "v5e": Card(r"TPU v5( lite|e)", 16 * GIB, 197 * TERA, 200 * GB),
    "v5p": Card(r"TPU v5p?", 95 * GIB, 459 * TERA, 600 * GB),
    "v6e": Card(r"TPU v6( lite|e)", 32 * GIB, 918 * TERA, 448 * GB),
}


def find(device_kind: str) -> Card | None:
    """The card that JAX calls by this name, if it is known."""
    for card in CARDS.values():
        if re.fullmatch(card.kind, device_kind, re.IGNORECASE):
            return card
    return None
