"""Keys, certificates, signed requests, the client's policy and its audit log."""
