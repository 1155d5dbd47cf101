"""Audits of a finished run: attacks on what its clients send and on their models, beside the privacy that it claims."""
