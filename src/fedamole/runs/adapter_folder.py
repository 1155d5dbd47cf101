"""Names of the files in an adapter folder, and the maximum number of experts in a module."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDENTITY = "base_identity.json"
CARD = "README.md"
FILES = (CONFIG, WEIGHTS, IDENTITY, CARD)
"""All files that fedamole writes into an adapter folder."""

MOST_RANK = 65_536
"""Largest rank of a LoRA."""
MOST_EXPERTS = 30_000
"""Maximum number of domain experts in a module; their ids are 0 to MOST_EXPERTS - 1. The default pool of FedAMoLE has
three experts per client."""
