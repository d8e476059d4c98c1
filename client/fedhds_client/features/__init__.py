"""Features of rows: hidden states, projected, cached, reduced and grouped."""
