"""Time a config's distillation step and a fine-tuning step of its student, with random weights.

uv run scripts/benchmark_step.py --help shows all options.
"""

from shallow_pi.commands import benchmark_step

if __name__ == "__main__":
    benchmark_step.main()
