"""The HTML report: one self-contained page on the runs of a federation, built from run files only."""
