"""The folder of a run: its files, checkpoints and identity. Needs no PyTorch."""
