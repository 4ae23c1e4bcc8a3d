"""Studies of claims: training of many small policies, measuring, and the page of results."""
