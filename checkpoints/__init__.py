"""Weights on disk: the shard directory, and the sources that weights may come from."""
