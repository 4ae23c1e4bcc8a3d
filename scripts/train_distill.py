"""Distil a deep policy into a shallow one, and measure both where the config has a task for it.

uv run scripts/train_distill.py --help tells more.
"""

from shallow_pi.commands import train_distill

if __name__ == "__main__":
    train_distill.main()
