"""The gateway in front of the SuperLink: the only part of a deployment that is reached from outside."""
