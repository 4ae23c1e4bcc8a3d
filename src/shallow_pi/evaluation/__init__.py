"""From policies to numbers: closed-loop success, intervals, reports and their plots."""
