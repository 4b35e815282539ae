"""The right to write a store: all of it, alone, or one stripe of its shards beside the writers of other stripes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .files import lock, unlock
from .layout import LOCK, Shard


class Stripe(NamedTuple):
    """Every ``n``-th shard, from shard ``at`` (0 to n - 1) on: the part of a store that one of n writers fills."""

    at: int
    n: int


class Claim:
    """The locks of one writer. A whole writer holds the store's lock alone; stripes share it, each with one of its own.

    Args:
        folder: The store's folder.
        stripe: Which shards; all when None.

    Attributes:
        stripe: Likewise.
        held: Whether the locks are held.
    """

    def __init__(self, folder: Path, stripe: Stripe | None) -> None:
        self._folder, self.stripe = folder, stripe
        self._locks: list[int] = []

    @property
    def held(self) -> bool:
        """Whether the locks are held."""
        return bool(self._locks)

    def take(self) -> None:
        """Take the locks.

        Raises:
            StoreBusy: Another writer holds one of them.
            OSError: The file system has no locks.
        """
        self._locks.append(lock(self._folder, shared=self.stripe is not None))
        if self.stripe is not None:
            self._locks.append(lock(self._folder, f"{LOCK}-{self.stripe.at}-of-{self.stripe.n}"))

    def release(self) -> None:
        """Free the locks; nothing to do where none is held."""
        while self._locks:
            unlock(self._locks.pop())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Begin or end while no other stripe does; a whole writer is alone anyway."""
        if self.stripe is None:
            yield
            return
        handle = lock(self._folder, f"{LOCK}-ends", wait=True)
        try:
            yield
        finally:
            unlock(handle)

    def own(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of some shards that are this writer's."""
        stripe = self.stripe
        return [shard for shard in shards if stripe is None or shard.number % stripe.n == stripe.at]
