"""Train a deep teacher from scratch on the task loss, evaluate it, and package it.

uv run scripts/train_teacher.py --help shows all options.
"""

from shallow_pi.commands import train_teacher

if __name__ == "__main__":
    train_teacher.main()
