"""Runs across organisations: server and client processes, certificates, and the connection between them."""
