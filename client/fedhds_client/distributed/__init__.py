"""A site of several processes, started by `accelerate launch`: one leader, and workers for feature extraction."""
