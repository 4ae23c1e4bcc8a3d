"""Compile a config's step for devices that are not there: its memory, communication and time.

uv run scripts/compile_ahead.py --help tells more.
"""

from shallow_pi.commands import compile_ahead

if __name__ == "__main__":
    compile_ahead.main()
