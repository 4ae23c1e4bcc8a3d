"""Measure the activations of a policy on data, so that it can run in 8 bits.

uv run scripts/calibrate.py --help shows all options.
"""

from shallow_pi.commands import calibrate

if __name__ == "__main__":
    calibrate.main()
