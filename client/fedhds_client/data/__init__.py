"""Instruction data: files to rows, rows to prompts and tokens."""
