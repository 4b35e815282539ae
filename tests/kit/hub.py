"""A cache of the Hugging Face hub, laid out as its client lays it."""

import hashlib
import shutil
from pathlib import Path

from mmcli.pipeline.core.config import DEFAULT_MODEL


class HubCache:
    """A cache of the Hugging Face hub as its client lays it out: blobs, links to them by commit, names of commits."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, model: Path, commit: str, *refs: str, name: str = DEFAULT_MODEL) -> Path:
        """Put the files of a checkpoint there; the folder of the snapshot."""
        repo = self.root / f"models--{name.replace('/', '--')}"
        snapshot = repo / "snapshots" / commit
        for folder in (repo / "blobs", repo / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        for ref in refs:
            (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (repo / "refs" / ref).write_text(commit)
        return snapshot
