"""Whether a finetuning may begin with a run: its head and towers must not have been trained on what is held out now."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ... import InputError
from ..core.config import DataConfig, load_config
from ..core.results import codes_path, read_codes
from ..core.run import read_info
from ..data.protocols import lists_digest

Ids = npt.NDArray[np.int64]


def refuse_seen(start: Path, data: DataConfig, manifest_sha256: str, image_ids: Mapping[str, Ids]) -> None:
    """Refuse a run that was trained on images that would tune or test the head now.

    The run's train images, and those of the runs that it began with in turn, are named in their codes. Where codes are
    missing, only a run of the same manifest and protocol is taken: its held-out images are the same.

    Args:
        start: The run to begin with.
        data: The data section of the finetuning.
        manifest_sha256: Content hash of its manifest.
        image_ids: Of its splits, ``(n,)`` int64.

    Raises:
        InputError: Such images, or another manifest or protocol where nothing can be compared.
    """
    seen = _seen(start)
    if seen is None:
        _refuse_other_data(start, data, manifest_sha256)
        return
    for split in ("test", "val"):
        common = np.intersect1d(seen, image_ids[split])
        if len(common):
            raise InputError(
                f"{split} images that the run was trained on", where=start,
                got=f"{len(common):,} of {len(np.unique(image_ids[split])):,} in common, as image id {common[0]}",
                wanted="none", do="leave --protocol out with --from, or start from a run that has not seen them",
            )  # fmt: skip


def _refuse_other_data(start: Path, data: DataConfig, manifest_sha256: str) -> None:
    info, theirs = read_info(start), load_config(start / "config.yaml").data
    read = (info.lists_digest or lists_digest(theirs), lists_digest(data))
    protocols = [
        " of ".join(filter(None, (one.split_type, lists[:12]))) for one, lists in zip((theirs, data), read, strict=True)
    ]
    pairs = {"protocol": protocols, "manifest": [info.manifest_sha256[:12], manifest_sha256[:12]]}
    for name, (was, now) in pairs.items():
        if was != now:
            raise InputError(
                f"another {name} than the run's, and it does not say which images it was trained on",
                where=codes_path(start, "train"), got=now, wanted=was,
                do="bring its codes back, or start from another run",
            )  # fmt: skip


def _seen(start: Path) -> Ids | None:
    """Ids of all images that a run, and what it began with, was trained on; None where one of them does not say."""
    found: list[Ids] = []
    passed: set[Path] = set()
    following: Path | None = start
    while following is not None and following.resolve() not in passed:
        passed.add(following.resolve())
        if not codes_path(following, "train").is_file():
            return None
        found.append(read_codes(following, "train").image_id)
        try:
            before = load_config(following / "config.yaml").finetune.start
        except InputError:
            return None
        following = None if before is None else Path(before)
    return np.unique(np.concatenate(found))
