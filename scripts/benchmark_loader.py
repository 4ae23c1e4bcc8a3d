"""Measure how fast pictures come out of a dataset: PyAV alone, the loader, the loader's caches.

uv run scripts/benchmark_loader.py --help tells more.
"""

from shallow_pi.commands import benchmark_loader

if __name__ == "__main__":
    benchmark_loader.main()
