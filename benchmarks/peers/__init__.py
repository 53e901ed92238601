"""Other ways to run the same model, to measure against."""
