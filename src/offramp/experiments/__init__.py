"""Experiments: one module a study; a table row is a value, not a script."""
