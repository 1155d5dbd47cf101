"""The report: one HTML page on the runs of a federation. Reads run files only; needs no network, ever."""
