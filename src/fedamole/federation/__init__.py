"""The round: the method interface, records, local training, the loop, checkpoints."""
