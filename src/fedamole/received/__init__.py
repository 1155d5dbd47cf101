"""Validation of names, paths, JSON and files that come from other machines."""
