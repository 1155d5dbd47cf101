"""Everything that uses Flower."""
