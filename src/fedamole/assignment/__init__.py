"""Reverse selection: assigns domain experts to clients. Pure functions on arrays."""
