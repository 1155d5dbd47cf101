"""Keys, certificates, signed orders, the client's policy and its audit log."""
