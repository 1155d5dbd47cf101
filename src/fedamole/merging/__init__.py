"""Merging LoRAs of one base into one LoRA: functions on factors A and B, without clients or files."""
