"""The native decoder, its checkpoints, and its fast steps for a few tokens."""
