"""After training: find personal models, generate and chat with them, explain, export, and adapt to a new client."""
