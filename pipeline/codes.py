"""Codes of a split: all that neighbours, votes and metrics need, so that neither towers nor store are read again."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .. import InputError
from ..heads.sigmoid import sigmoid
from .files import write_whole

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Codes of the n images of a split, in manifest order, from ``eval()`` mode and the first caption.

    Attributes:
        image_id: ``(n,)`` int64.
        soft: Soft codes h ``(n, B)`` float32, or z ``(n, 512)`` for a head without hash layer.
        packed: Hard codes, ``(n, B/8)`` uint8, eight bits a byte; ``None`` without hash layer.
        labels: ``(n, C)`` uint8, 0 or 1.
        logits: The classifier's, ``(n, C)`` float32; ``None`` for the train split.
        norm_img: Norms of the image embeddings as the head read them ``(n,)`` float32; ``None`` in runs of before
            they were kept.
        norm_txt: Those of the first captions, likewise.
    """

    image_id: npt.NDArray[np.int64]
    soft: npt.NDArray[np.float32]
    packed: npt.NDArray[np.uint8] | None
    labels: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32] | None
    norm_img: npt.NDArray[np.float32] | None = None
    norm_txt: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.image_id)

    @property
    def probabilities(self) -> npt.NDArray[np.float64] | None:
        """The classifier's scores, sigmoid of the logits ``(n, C)`` float64; ``None`` where no logits were kept.

        In float32 all logits above 17 would be 1, and what the classifier ranks would be tied.
        """
        return None if self.logits is None else sigmoid(self.logits)


def codes_path(run: Path, split: str) -> Path:
    """Where a run keeps the codes of a split."""
    return run / "codes" / f"{split}.safetensors"


def write_codes(run: Path, split: str, codes: Codes) -> Path:
    """Write the codes of a split into a run."""
    arrays = {name: np.ascontiguousarray(value) for name, value in vars(codes).items() if value is not None}
    path = codes_path(run, split)
    write_whole(path, lambda temporary: save_file(arrays, temporary))
    return path


def read_codes(run: Path, split: str) -> Codes:
    """Read the codes of a split.

    Raises:
        InputError: The file is missing, damaged, or its arrays do not fit each other.
    """
    path = codes_path(run, split)
    do = "train the head again with `mmcli train-head`"
    try:
        arrays = load_file(path)
    except OSError:
        raise InputError("no codes", where=path, got="no file", wanted="the codes of a run", do=do) from None
    except SafetensorError as error:
        raise InputError("damaged codes", where=path, got=error, wanted="a safetensors file", do=do) from None
    missing = {"image_id", "soft", "labels"} - arrays.keys()
    lengths = {len(value) for value in arrays.values()}
    if missing or len(lengths) != 1:
        got = f"no {', '.join(sorted(missing))}" if missing else f"lengths {sorted(lengths)}"
        raise InputError("damaged codes", where=path, got=got, wanted="arrays of one length", do=do)
    if not np.isfinite(arrays["soft"]).all():
        row = int(np.flatnonzero(~np.isfinite(arrays["soft"]).all(axis=1))[0])
        raise InputError("damaged codes", where=f"{path}, row {row}", got="NaN or inf", wanted="numbers", do=do)
    return Codes(
        image_id=arrays["image_id"], soft=arrays["soft"], packed=arrays.get("packed"), labels=arrays["labels"],
        logits=arrays.get("logits"), norm_img=arrays.get("norm_img"), norm_txt=arrays.get("norm_txt"),
    )  # fmt: skip
