"""Evaluation after every epoch of a training: val mAP of what the user will use, and whether the codes collapse.

Symbols: n images of a split, B bits, C classes.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from ...heads.hashing import binarise, pack_codes
from ...heads.knn import build_index
from ...heads.metrics import mean_average_precision
from ...heads.model import BaseHead
from ...heads.voting import vote
from ..core.config import Config
from .data import Split, encode_split

# Train images that vote while training goes on; the codes of all of them are written at the end. Encoding every image
# of COCO after every epoch would cost as much as a quarter of the epoch.
VOTERS = 16_384
# A bit whose mean is so large is the same for 98 % of the images; a code that is so hard passes no gradient on.
DEAD, SATURATED = 0.96, 0.98
# Of fewer images neither says anything; and so near to the prior, of what lies between it and 1, nothing was learnt.
ENOUGH, NEAR = 20, 0.02
# Below this share of the whole gradient, the fusion learns nothing any more.
GONE = 1e-4


class Monitor:
    """Val mAP of a head, from the votes of train neighbours or from the classifier, and facts of its codes.

    Args:
        config: The knn, hash and training sections are used.
        train: The train split; at most ``VOTERS`` images of it vote, drawn once by ``hardware.seed``.
        val: The val split.
    """

    def __init__(self, config: Config, train: Split, val: Split) -> None:
        self._config, self._val = config, val
        self._voters = train.sample(max(VOTERS, config.knn.K), config.hardware.seed)
        self._labels = {name: split.own_labels.cpu().numpy() for name, split in (("train", self._voters), ("val", val))}

    @property
    def voters(self) -> Split:
        """The train images that vote."""
        return self._voters

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows of the store that are looked at, ascending."""
        rows: npt.NDArray[np.int64] = np.unique(torch.cat([self._voters.rows, self._val.rows]).cpu().numpy())
        return rows

    @property
    def prior(self) -> float:
        """Val mAP of scores that are the same for every image: the mean prevalence of classes that occur in val."""
        share = self._labels["val"].mean(axis=0)
        return float(share[share > 0].mean())

    def __call__(self, head: BaseHead) -> dict[str, float]:
        """``val_mAP``, and for a head with a hash layer ``bit_balance``, ``dead_bits`` and ``mean_abs_h`` on val.

        Bit balance is the mean over bits of ``|mean_n b|``: 0 where every bit is on half of the time, 1 where none
        ever changes.
        """
        features, logits = (tensor.cpu().numpy() for tensor in encode_split(head, self._val))
        facts = self._facts(features)
        if self._config.training.monitor == "classifier":
            return {"val_mAP": mean_average_precision(logits, self._labels["val"]), **facts}
        base = encode_split(head, self._voters)[0].cpu().numpy()
        packed = [pack_codes(binarise(soft)) if self._config.hash.bits else None for soft in (base, features)]
        index = build_index(self._config.knn.distance_metric, packed=packed[0], soft=base)
        neighbours = index.search(packed=packed[1], soft=features, K=self._config.knn.K)
        scores = vote(neighbours, self._labels["train"], self._config.knn)
        return {"val_mAP": mean_average_precision(scores, self._labels["val"]), **facts}

    def _facts(self, soft: npt.NDArray[np.float32]) -> dict[str, float]:
        if not self._config.hash.bits:
            return {}
        lean = np.abs(np.where(soft >= 0, 1.0, -1.0).mean(axis=0))
        return {
            "bit_balance": float(lean.mean()),
            "dead_bits": float((lean > DEAD).sum()),
            "mean_abs_h": float(np.abs(soft).mean()),
        }


class CollapseWarnings:
    """Warns, once of each sign, that a training has collapsed.

    Args:
        config: The hash section is used.
        prior: Val mAP of the class frequencies.
        n_val: Images of val.
    """

    def __init__(self, config: Config, *, prior: float, n_val: int) -> None:
        self._bits, self._saturates = config.hash.bits, config.hash.activation == "tanh"
        self._prior, self._n_val = prior, n_val
        self._shown: set[str] = set()

    def lines(self, record: Mapping[str, float]) -> list[str]:
        """Warnings that the record of an epoch gives rise to for the first time."""
        epoch = int(record["epoch"])
        dead, hard = record.get("dead_bits", 0.0), record.get("mean_abs_h", 0.0)
        norm, fusion = record.get("grad_norm", 0.0), record.get("grad_norm_fusion", 0.0)
        enough = self._n_val >= ENOUGH
        signs = {
            "dead": (enough and dead > self._bits / 4, f"{dead:.0f} of {self._bits} bits are the same for 98 % of val"),
            # Saturated codes of a straight-through head pass gradients on.
            "saturated": (self._saturates and hard > SATURATED, f"the soft codes are saturated (mean |h| {hard:.3f})"),
            "gone": (
                self._bits and math.isfinite(norm) and fusion < GONE * norm,
                f"no gradient reaches the fusion ({fusion:.2g} of {norm:.2g})",
            ),
            "prior": (
                enough and epoch >= 3 and record["val_mAP"] - self._prior < NEAR * (1 - self._prior),
                f"val mAP {record['val_mAP']:.3f} is that of the class frequencies ({self._prior:.3f})",
            ),
        }
        new = [name for name, (shows, _) in signs.items() if shows and name not in self._shown]
        self._shown.update(new)
        do = "try --preset recommended, --gamma 0 or another learning rate"
        return [f"warning: epoch {epoch}: {signs[name][1]}; {do}" for name in new]
