"""Measure a policy server's latency and throughput with many simultaneous clients.

uv run scripts/load_test.py --help shows all options.
"""

from shallow_pi.commands import load_test

if __name__ == "__main__":
    load_test.main()
