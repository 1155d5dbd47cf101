"""Secure aggregation: the server learns the sum over the holders of a tensor, and no single client's value."""
