"""Synthetic examples: rows whose prompts hold virtual tokens, and objectives for the vectors of these tokens."""
