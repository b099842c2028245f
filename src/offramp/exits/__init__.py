"""Exits as tensors and callables: loss weights, the loss, confidence, policies."""
