"""Time a config's distillation step and its student's own fine-tuning step, with random weights.

uv run scripts/benchmark_step.py --help tells more.
"""

from shallow_pi.commands import benchmark_step

if __name__ == "__main__":
    benchmark_step.main()
