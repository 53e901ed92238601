"""Graph changes, one per file. Weights stay lazy: a pass that changes a weight changes how it will be read."""
