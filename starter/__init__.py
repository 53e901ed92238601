"""Trains the starter model: a tiny Meissonic-type checkpoint that draws coloured shapes."""
