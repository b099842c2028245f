"""Guarantees for texts that the model writes itself."""
