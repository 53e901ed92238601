"""Bundle in, smaller bundle out: weights become 4- or 8-bit integers, one tensor at a time and without PyTorch."""
