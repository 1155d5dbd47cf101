"""What becomes of a personal model after training: it is used, moved, and looked into."""
