"""The sigmoid, as exactly as float64 has it."""

from typing import Any

import numpy as np
import numpy.typing as npt


def sigmoid(x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """``1 / (1 + exp(-x))``, computed with ``exp(-|x|)``: nothing overflows, and small values keep all their digits.

    ``(1 + tanh(x / 2)) / 2`` is the same on paper, but below about -37 it is 0. Above 37 every value is 1, whatever the
    formula: what is to be ranked is ranked by x.

    Args:
        x: Logits of any shape.
    """
    x = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(x))
    value: npt.NDArray[Any] = np.where(x >= 0, 1.0, small) / (1.0 + small)
    return value
