"""The commands that the client package adds to the toolbox `fedhds`."""
