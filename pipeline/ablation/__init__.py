"""Experiments: plan them, run what is missing, and keep one table."""
