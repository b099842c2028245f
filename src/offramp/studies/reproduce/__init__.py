"""The seed document's Experiments 5 and 6: published figures, methods, tables and claims."""
