"""Code that several methods share: averages, stacked changes, ranks, clusters, architectures."""
