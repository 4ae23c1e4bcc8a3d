"""Predict the time of one inference on a board that is not here, with the arithmetic.

uv run scripts/predict_latency.py --help tells more.
"""

from shallow_pi.commands import predict_latency

if __name__ == "__main__":
    predict_latency.main()
