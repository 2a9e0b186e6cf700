"""Experiments: `run.py` and one short module each, measure -> judge -> draw."""
