"""Evaluation: one pass of the model records a trace, and all figures are computed from it."""
