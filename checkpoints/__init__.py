"""Weights on disk: the shard directory, the sources they may come from, and the state of a training run."""
