"""Measure how fast a dataset's images are read: by PyAV alone, the loader, the loader's caches.

uv run scripts/benchmark_loader.py --help shows all options.
"""

from shallow_pi.commands import benchmark_loader

if __name__ == "__main__":
    benchmark_loader.main()
