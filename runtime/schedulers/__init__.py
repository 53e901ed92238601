"""Noise and masking schedules in plain numpy, one algorithm per file."""
