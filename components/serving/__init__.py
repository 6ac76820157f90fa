"""Using a version: labels and probabilities for texts."""
