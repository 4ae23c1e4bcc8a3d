"""Record what openpi makes of the inputs in tests/parity.py, for the tests without openpi.

uv run --project tests/interop tests/interop/record_parity.py

Writes tests/models/openpi_parity.npz. Run it when the inputs change, and say so in the commit.
"""

import pathlib
import sys

import numpy as np

TESTS = pathlib.Path(__file__).parents[1]
RECORDED = TESTS / "models" / "openpi_parity.npz"


def main() -> None:
    """Run every model of the parity through openpi."""
    sys.path[:0] = [str(TESTS), str(TESTS / "interop")]
    import parity
    import theirs

    recorded = {
        f"{name}/{what}": value
        for name, config in parity.MODELS.items()
        for what, value in theirs.results(config).items()
    }
    np.savez_compressed(RECORDED, **recorded)
    print(f"{RECORDED}: {len(recorded)} arrays, {RECORDED.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
