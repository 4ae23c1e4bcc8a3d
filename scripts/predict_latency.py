"""Predict the time of one inference on another device, and show the arithmetic.

uv run scripts/predict_latency.py --help shows all options.
"""

from shallow_pi.commands import predict_latency

if __name__ == "__main__":
    predict_latency.main()
