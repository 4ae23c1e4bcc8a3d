"""Serve a student with openpi's own scripts/serve_policy.py, unmodified.

uv run scripts/serve_openpi.py --help tells more.
"""

from shallow_pi.commands import serve_openpi

if __name__ == "__main__":
    serve_openpi.main()
