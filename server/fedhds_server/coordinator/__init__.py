"""The I/O shell of the state machine: commits its state, performs its instructions, knows which sites are present."""

from fedhds_server.coordinator.coordinator import Coordinator

__all__ = ["Coordinator"]
