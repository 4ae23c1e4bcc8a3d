"""Serve a student with openpi's unmodified scripts/serve_policy.py.

uv run scripts/serve_openpi.py --help shows all options.
"""

from shallow_pi.commands import serve_openpi

if __name__ == "__main__":
    serve_openpi.main()
