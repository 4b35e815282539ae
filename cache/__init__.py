"""The store: named arrays in checked HDF5 shards. It imports no torch, transformers or faiss."""

from .errors import StoreBusy, StoreDamaged, StoreError, StoreMismatch, StoreMissing, StoreUnfinished
from .key import StoreKey
from .layout import FORMAT_VERSION, Layout, Part, Shard
from .reader import Embeddings, Store, list_stores, newest_store
from .sweep import DamagedShard
from .verify import VerifyReport, describe, verify
from .writer import StoreWriter, Stripe

__all__ = [
    "FORMAT_VERSION",
    "DamagedShard",
    "Embeddings",
    "Layout",
    "Part",
    "Shard",
    "Store",
    "StoreBusy",
    "StoreDamaged",
    "StoreError",
    "StoreKey",
    "StoreMismatch",
    "StoreMissing",
    "StoreUnfinished",
    "StoreWriter",
    "Stripe",
    "VerifyReport",
    "describe",
    "list_stores",
    "newest_store",
    "verify",
]
