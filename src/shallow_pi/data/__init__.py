"""From recordings to batches: datasets, transforms, normalization, the loader."""
