"""Look at a config's data before training on it: pictures, prompts, ranges, and what is doubtful.

uv run scripts/inspect_data.py --help tells more.
"""

from shallow_pi.commands import inspect_data

if __name__ == "__main__":
    inspect_data.main()
