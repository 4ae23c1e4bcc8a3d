"""Estimate the memory that a config needs on each device, and the largest batch that fits.

uv run scripts/estimate_memory.py --help shows all options.
"""

from shallow_pi.commands import estimate_memory

if __name__ == "__main__":
    estimate_memory.main()
