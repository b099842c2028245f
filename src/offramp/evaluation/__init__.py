"""Evaluation: one pass of the model makes a trace; everything after it is array work."""
