"""Checkpoint folder in, bundle out. The only part of pochade that needs PyTorch."""
