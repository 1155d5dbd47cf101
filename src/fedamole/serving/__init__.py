"""An HTTP server for personal models: one base in memory, one adapter per client, OpenAI's API."""
