"""The cost of a step before it runs: memory, compilation, collectives."""
