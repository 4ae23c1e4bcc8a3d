"""Time one inference at batch 1, with random weights: by part, by size, and by optimization.

uv run scripts/benchmark.py --help shows all options.
"""

from shallow_pi.commands import benchmark

if __name__ == "__main__":
    benchmark.main()
