"""A site: it reads its own shard, selects, trains and evaluates, and dials out to the coordinator only."""
