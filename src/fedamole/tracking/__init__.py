"""Experiment trackers: the series of a run in TensorBoard, Weights & Biases, MLflow and Trackio."""
