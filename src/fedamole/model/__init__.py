"""The frozen base model and its adapters, in PyTorch on Hugging Face models, independent of federated learning."""
