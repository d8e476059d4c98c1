"""What both daemons share: the wire contract, the run's specification, adapters, privacy and identity."""

__version__ = "0.2.0.dev0"
