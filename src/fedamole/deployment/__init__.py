"""Across organisations: servers, clients, certificates, processes."""
