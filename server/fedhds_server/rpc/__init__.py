"""The gRPC side of the coordinator: thin servicers, and the validation of what comes in."""
