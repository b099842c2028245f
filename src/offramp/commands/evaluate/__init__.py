"""Tasks of lm-evaluation-harness, run with exits: ``offramp evaluate``."""
