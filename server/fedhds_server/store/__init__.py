"""Durable state of a run: an interface, and its SQL implementation."""
