"""Personal models answering over HTTP: all clients of a run on one resident base, as OpenAI's interface asks."""
