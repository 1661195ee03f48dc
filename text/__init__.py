"""Tokenizers and datasets: text to token ids and back, and batches of them."""
