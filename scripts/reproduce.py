"""Measure the paper's claims on the tabletop suite, and write the page of evidence.

uv run scripts/reproduce.py --help shows all options.
"""

from shallow_pi.commands import reproduce

if __name__ == "__main__":
    reproduce.main()
