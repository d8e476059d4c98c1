"""Secure aggregation at a site: what it answers in each step of a round, and what it refuses to answer."""
