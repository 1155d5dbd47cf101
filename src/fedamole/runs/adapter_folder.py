"""The files of an adapter folder, and the largest number of experts in one."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDENTITY = "base_identity.json"
CARD = "README.md"
FILES = (CONFIG, WEIGHTS, IDENTITY, CARD)
"""All files that fedamole writes into an adapter folder."""

MOST_EXPERTS = 30_000
"""Most domain experts of a module; their ids run from 0 to one less. FedAMoLE's default pool has three per client."""
