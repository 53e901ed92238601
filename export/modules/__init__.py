"""PyTorch modules that load the published weights by their published keys, written from the specifications."""
