"""The store: named arrays in checked HDF5 shards. It imports no torch, transformers or faiss."""

from .claim import Stripe
from .errors import StoreBusy, StoreDamaged, StoreError, StoreMismatch, StoreMissing, StoreUnfinished
from .export import ExportReport, export_store
from .folder import DamagedShard
from .info import describe
from .key import StoreKey
from .layout import FORMAT_VERSION, Layout, Part, Shard
from .leaks import Leak, LeakReport, find_leaks, passes
from .places import is_remote, place
from .reader import Embeddings, Store, list_stores, newest_store
from .verify import VerifyReport, verify
from .writer import StoreWriter

__all__ = [
    "FORMAT_VERSION",
    "DamagedShard",
    "Embeddings",
    "ExportReport",
    "Layout",
    "Leak",
    "LeakReport",
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
    "export_store",
    "find_leaks",
    "is_remote",
    "list_stores",
    "newest_store",
    "passes",
    "place",
    "verify",
]
