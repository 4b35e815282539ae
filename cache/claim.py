"""Locks for writing a store: all of it, or one stripe (every n-th shard) beside writers of the other stripes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from .errors import StoreBusy
from .layout import LOCK, STRIPE_LOCK, Shard
from .locks import SOFT, LockHeld, locked
from .places import is_remote

# A stripe holds the store's lock for the moment in which it takes its own; a whole writer holds it to its end.
MOMENT_S = 3.0
FOR_EVER = -1.0


class Stripe(NamedTuple):
    """Every ``n``-th shard, beginning with shard ``number`` (0 to n - 1): the part of a store that one writer fills."""

    number: int
    n: int


class Claim:
    """The locks of one writer. A whole writer holds the store's lock, and those of all stripes; a stripe has its own.

    A store of objects has no locks.

    Args:
        folder: The store's folder.
        stripe: Which shards; all when None.

    Attributes:
        stripe: Which shards; all when None.
        held: Whether the claim is held.
    """

    def __init__(self, folder: Path, stripe: Stripe | None) -> None:
        self._folder, self.stripe = folder, stripe
        self.held = False
        self._locks = ExitStack()

    def take(self) -> None:
        """Take the locks of this writer.

        Raises:
            StoreBusy: Another writer holds one of them.
            OSError: The folder cannot be written.
        """
        if not is_remote(self._folder):
            try:
                if self.stripe is not None:
                    with locked(self._folder / LOCK, wait_s=MOMENT_S):
                        self._hold(f"{LOCK}-{self.stripe.number}-of-{self.stripe.n}")
                else:
                    self._hold(LOCK)  # no stripe can begin now; those that began before hold their own
                    names = {path.name.removesuffix(SOFT) for path in self._folder.iterdir()}
                    for name in sorted(filter(STRIPE_LOCK.fullmatch, names)):
                        self._hold(name)
            except LockHeld as error:
                raise StoreBusy(
                    "another process writes this store", where=self._folder, do=f"{error.do}; what it wrote is kept"
                ) from None
        self.held = True

    def _hold(self, name: str) -> None:
        self._locks.enter_context(locked(self._folder / name))

    def release(self) -> None:
        """Free the locks; nothing to do where none is held."""
        self.held = False
        self._locks.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Begin or finish a store while no other stripe does; a whole writer is alone anyway."""
        if self.stripe is None or is_remote(self._folder):
            yield
            return
        with locked(self._folder / f"{LOCK}-ends", wait_s=FOR_EVER):
            yield

    def select(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of some shards that this writer has to write."""
        stripe = self.stripe
        return [shard for shard in shards if stripe is None or shard.number % stripe.n == stripe.number]
