"""What can be wrong with a store, as the user has to hear it: one line that says what to do."""

from ..errors import InputError

RESUME = "run `mmcli extract` again, it resumes and redoes only what is missing"


class StoreError(InputError):
    """Something about a store that the user can mend; the base of the others."""


class StoreMissing(StoreError):  # noqa: N818 - short, and InputError's family
    """There is no store where one was looked for."""


class StoreUnfinished(StoreError):  # noqa: N818 - short, and InputError's family
    """A store without its manifest: extraction was stopped, or something in it is being redone."""


class StoreMismatch(StoreError):  # noqa: N818 - short, and InputError's family
    """A store of another key, another shape or another format version than was asked for."""


class StoreDamaged(StoreError):  # noqa: N818 - short, and InputError's family
    """A file of the store is missing or is not what its checksum says."""


class StoreBusy(StoreError):  # noqa: N818 - short, and InputError's family
    """Another process writes this store."""
