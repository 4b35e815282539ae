"""Stage 1: images and captions through a frozen SigLIP2 into a store of raw embeddings."""
