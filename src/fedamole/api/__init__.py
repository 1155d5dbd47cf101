"""The Python interface: run, compare and read federated fine-tuning from a script or a notebook.

`import fedamole` offers its functions without importing PyTorch; see docs/python.md.
"""
