"""Serve a model over HTTP: OpenAI's API on the engine for many requests."""
