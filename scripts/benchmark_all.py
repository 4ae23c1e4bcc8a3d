"""Measure an accelerator at full size in five minutes at most: inference, training, openpi.

uv run scripts/benchmark_all.py --help shows all options.
"""

from shallow_pi.commands import benchmark_all

if __name__ == "__main__":
    benchmark_all.main()
