"""Time a policy server that is asked by many robots at once.

uv run scripts/load_test.py --help tells more.
"""

from shallow_pi.commands import load_test

if __name__ == "__main__":
    load_test.main()
