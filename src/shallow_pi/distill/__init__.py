"""The method: the path, the layer map, the cut, the losses and the step."""
