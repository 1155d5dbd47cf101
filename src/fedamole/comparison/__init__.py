"""`fedamole compare`: methods x seeds x scenarios from one file, each trial a run folder (docs/compare.md)."""
