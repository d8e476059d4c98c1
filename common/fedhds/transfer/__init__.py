"""How artifacts move: chunks as wire messages, and steps on the disk beside the event loop."""
