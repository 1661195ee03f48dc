"""Tokenizers and datasets: text to token ids and back, and batches of them. And how files from anywhere are read."""
