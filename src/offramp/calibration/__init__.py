"""Calibration: fit gates and temperatures to a model's exits, certify thresholds, keep a budget."""
