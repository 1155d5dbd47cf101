"""Reverse selection: which client holds which expert. Pure functions on arrays."""
