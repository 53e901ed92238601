"""Bundle in, image out: numpy, ONNX Runtime, tokenizers and Pillow, nothing else."""
