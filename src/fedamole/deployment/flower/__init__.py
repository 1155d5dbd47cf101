"""Everything that uses Flower: its processes, messages and APIs."""
