"""Full-size checkpoints with random weights, and measurements on them."""
