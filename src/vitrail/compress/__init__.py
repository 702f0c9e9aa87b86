"""Smaller and faster models: quantisation, pruning, fewer tokens."""
