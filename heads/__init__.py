"""Tensors or arrays in, tensors or arrays out: heads, losses, neighbours, votes, metrics."""
