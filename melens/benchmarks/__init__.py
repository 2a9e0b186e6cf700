"""Benchmarks of a model with masks and without: tables 1, 2, 5, 6 and 7 (sections 5.1 and 5.2, appendices E, F, G)."""
