"""Adapters as named tensors on disk and on the wire, whatever PEFT method they belong to."""
