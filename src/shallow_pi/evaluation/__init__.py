"""From policy to numbers: simulators, closed-loop success, latency, reports."""
