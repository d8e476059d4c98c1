"""What both daemons share: the wire contract, the run's specification, adapters, privacy and identity."""

__version__ = "0.2.0.dev0"
PROTOCOL_VERSIONS = (1,)
"""Versions of the wire contract that this version of fedhds speaks, on both sides."""
