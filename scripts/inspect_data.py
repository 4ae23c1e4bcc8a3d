"""Inspect a config's data before training: images, prompts, ranges and suspicious values.

uv run scripts/inspect_data.py --help shows all options.
"""

from shallow_pi.commands import inspect_data

if __name__ == "__main__":
    inspect_data.main()
