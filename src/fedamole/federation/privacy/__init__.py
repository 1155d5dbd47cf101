"""Differential privacy (`[privacy]`): what leaves a client is noised, counted in a ledger, and stopped at a budget."""
