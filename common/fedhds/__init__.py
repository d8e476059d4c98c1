"""What both daemons share: the wire contract, the run's specification, adapters, privacy and identity."""

__version__ = "0.3.0.dev0"
PROTOCOL_VERSIONS = (2,)
"""Versions of the wire contract that this version of fedhds speaks, on both sides."""
