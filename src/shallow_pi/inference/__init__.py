"""The forward pass made fast: prepared weights, kernels, sampler, real-time chunking."""
