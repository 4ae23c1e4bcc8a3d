"""Serve a policy to robots, with openpi's protocol.

uv run scripts/serve_policy.py --help tells more.
"""

from shallow_pi.commands import serve_policy

if __name__ == "__main__":
    serve_policy.main()
