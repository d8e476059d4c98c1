"""The run as a pure state machine: events in, instructions out; no I/O and no clock of its own."""
