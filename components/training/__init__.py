"""One training: a pure function from a job spec to a bundle."""
