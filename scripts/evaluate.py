"""Evaluate policies closed loop on a simulated benchmark, on the same episodes.

uv run scripts/evaluate.py --help shows all options.
"""

from shallow_pi.commands import evaluate

if __name__ == "__main__":
    evaluate.main()
