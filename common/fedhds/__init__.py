"""What both daemons share: the wire contract, the run's specification, adapters, privacy and identity."""

__version__ = "0.1.0"
