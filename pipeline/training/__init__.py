"""Stage 2: a head trained from a store."""
