"""From pyarrow to numpy and back without pandas: the same values as by pyarrow's own ways."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.cache.arrow import booleans, integers, numbers, texts

KINDS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@given(values=st.lists(st.integers(0, 100)), kind=st.sampled_from(KINDS), cut=st.integers(0, 5))
def test_numbers_there_and_back(values, kind, cut):
    wanted = np.array(values, kind)
    array = pa.array(values, kind)
    for given_ in (array, pa.chunked_array([array]), pa.chunked_array([array[:cut], array[cut:]])):
        got = numbers(given_)
        assert got.dtype == wanted.dtype
        assert not got.flags.writeable or not len(got)
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(numbers(array[cut:]), wanted[cut:])
    assert integers(wanted).equals(array)
    assert integers(np.repeat(wanted, 2)[::2]).equals(array)
    assert numbers(integers(wanted)).tolist() == values


@given(st.lists(st.booleans()))
def test_truth_values(values):
    assert booleans(np.array(values, bool)).equals(pa.array(values, pa.bool_()))


@given(st.lists(st.text()))
def test_texts(values):
    assert texts(values).equals(pa.array(values, pa.string()))


def test_only_whole_numbers_without_nulls():
    for values in (pa.array([1.0]), pa.array([1, None]), pa.array(["a"])):
        with pytest.raises(AssertionError):
            numbers(values)
