"""Local training: the loop and the loss."""
