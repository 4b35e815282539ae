"""This machine's speed beside the plain way."""
