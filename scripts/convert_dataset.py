"""Convert a LeRobot dataset (v2.0, v2.1, v3.0) to v3.0, and its images to a faster encoding.

uv run scripts/convert_dataset.py --help shows all options.
"""

from shallow_pi.commands import convert_dataset

if __name__ == "__main__":
    convert_dataset.main()
