"""Models: the ``EarlyExitModel`` protocol that all features use, and its implementations."""
