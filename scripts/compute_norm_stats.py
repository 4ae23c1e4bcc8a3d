"""Compute a dataset's normalization statistics, exactly and without decoding an image.

uv run scripts/compute_norm_stats.py --help shows all options.
"""

from shallow_pi.commands import compute_norm_stats

if __name__ == "__main__":
    compute_norm_stats.main()
