"""The codes of a run that an evaluation of neighbours reads, and whether they serve what was asked for."""

from dataclasses import dataclass

import numpy as np

from ... import InputError
from ...heads.config import KnnConfig, Metric
from ..core.results import Codes, codes_path, read_codes
from ..core.run import Run


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Codes of a run that an evaluation reads.

    Attributes:
        base: The codes that vote: those of ``database`` where the protocol has one, else of train.
        val: Those that thresholds and the mix are tuned on.
        query: Those that are tagged.
        split: Name of their split.
    """

    base: Codes
    val: Codes
    query: Codes
    split: str

    @classmethod
    def of(cls, run: Run, split: str) -> "Evaluated":
        """Read what is needed of a run.

        Raises:
            InputError: Damaged codes, or a split without images.
        """
        voters = "database" if codes_path(run.folder, "database").is_file() else "train"
        base, val = read_codes(run.folder, voters), read_codes(run.folder, "val")
        query = {voters: base, "val": val}.get(split) or read_codes(run.folder, split)
        if not len(query):
            raise InputError(
                "an empty split", where=run.folder, got=f"no {split} images", wanted="some", do="choose --split"
            )
        return cls(base=base, val=val, query=query, split=split)

    def check_k(self, K: int, run: Run) -> None:
        """Refuse more neighbours than there are for a query, or an image of val, that is in the index itself.

        Raises:
            InputError: There are fewer.
        """
        asked = np.concatenate([self.query.image_id, self.val.image_id])
        inside = bool(np.isin(asked, self.base.image_id).any())
        usable = len(self.base) - inside
        if usable < K:
            raise InputError(
                "K is larger than the index", where=run.folder, got=f"--k {K}", wanted=f"at most {usable}",
                do="lower --k",
            )  # fmt: skip


def fitting_metric(knn: KnnConfig, base: Codes, run: Run) -> Metric:
    """Without a hash layer neighbours are found by cosine on z; Hamming asked for in so many words is refused.

    Raises:
        InputError: It was.
    """
    if base.packed is not None or knn.distance_metric == "cosine":
        return knn.distance_metric
    if "distance_metric" in knn.model_fields_set:
        raise InputError(
            "no hash layer", where=run.folder, got=f"--metric {knn.distance_metric}", wanted="--metric cosine",
            do="train with `mmcli train-head --bits 64`, or use --metric cosine",
        )  # fmt: skip
    return "cosine"
