"""The sigmoid against high precision, at both ends."""

from decimal import Decimal, localcontext

import numpy as np
import pytest

from mmcli.heads.sigmoid import sigmoid


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-300, 0.3, -0.3, 5.0, -5.0, 16.7, -16.7, 36.0, -36.0, -40.0, -700.0, 700.0])
def test_every_digit_is_right(x: float) -> None:
    with localcontext() as context:
        context.prec = 400
        wanted = float(1 / (1 + (-Decimal(x)).exp()))
    assert float(sigmoid(np.float32(x))) == pytest.approx(float(sigmoid(x)), rel=1e-5)
    assert float(sigmoid(x)) == pytest.approx(wanted, rel=1e-15, abs=0)


def test_no_overflow_and_no_order_lost_below() -> None:
    assert sigmoid([-1e308, 1e308]).tolist() == [0.0, 1.0]
    assert (np.diff(sigmoid(np.linspace(-700, 30, 1000))) > 0).all()
