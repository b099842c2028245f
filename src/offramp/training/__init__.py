"""Train a model with any objective, in one process or several; killed runs can be resumed."""
