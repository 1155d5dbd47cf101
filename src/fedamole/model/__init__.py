"""The frozen base and the adapters on it: pure PyTorch on Hugging Face models; knows nothing of federation."""
