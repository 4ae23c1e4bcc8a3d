"""Distil a deep policy into a shallow one, and evaluate both if the config has a simulated task.

uv run scripts/train_distill.py --help shows all options.
"""

from shallow_pi.commands import train_distill

if __name__ == "__main__":
    train_distill.main()
