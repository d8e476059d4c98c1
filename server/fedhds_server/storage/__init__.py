"""Durable state: the run's row and journal, its artifacts, and the checkpoint that people take away."""
