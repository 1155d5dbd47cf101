"""The gateway in front of the SuperLink: the only externally reachable part of a deployment."""
