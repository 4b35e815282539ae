"""The store: named arrays in checked HDF5 shards. It imports no torch, transformers or faiss."""
