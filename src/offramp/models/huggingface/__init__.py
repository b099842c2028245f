"""Hugging Face causal language models with exits."""
