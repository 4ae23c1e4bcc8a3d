"""Record demonstrations of a simulator's scripted expert as a LeRobot v3.0 dataset.

uv run scripts/make_demonstrations.py --help shows all options.
"""

from shallow_pi.commands import make_demonstrations

if __name__ == "__main__":
    make_demonstrations.main()
