"""Compile a config's step for absent devices, and report memory, communication and time.

uv run scripts/compile_ahead.py --help shows all options.
"""

from shallow_pi.commands import compile_ahead

if __name__ == "__main__":
    compile_ahead.main()
