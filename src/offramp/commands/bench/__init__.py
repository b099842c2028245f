"""Decoding on the clock, beside its peers: ``offramp bench``."""
