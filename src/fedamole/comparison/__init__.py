"""`fedamole compare`: methods x seeds x scenarios from one file, each cell an ordinary run folder (docs/compare.md)."""
