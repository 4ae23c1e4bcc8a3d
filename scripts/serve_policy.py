"""Serve a policy to robots, with openpi's protocol; neither openpi nor torch is needed.

uv run scripts/serve_policy.py --help shows all options.
"""

from shallow_pi.commands import serve_policy

if __name__ == "__main__":
    serve_policy.main()
