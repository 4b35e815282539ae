"""The key: every field counts, two spellings do not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.cache import StoreError, StoreKey

OTHER = {
    "model": "google/siglip2-large-patch16-256",
    "revision": "sha256:1234",
    "processor": '{"mean": 0.25, "resample": 2}',
    "patches": 512,
    "text_length": 32,
    "dtype": "float32",
    "manifest_sha256": "cd" * 32,
    "compute_dtype": "bfloat16",
    "format_version": 3,
}
TEXT_FREE = {"patches", "processor"}


def test_every_field_is_tried(kit):
    assert set(OTHER) == set(kit.key().to_dict())


@pytest.mark.parametrize("name", OTHER)
def test_each_field_changes_the_digest(kit, name):
    one, other = kit.key(), kit.key(**{name: OTHER[name]})
    assert one.digest != other.digest
    assert (one.text_digest == other.text_digest) == (name in TEXT_FREE)
    (line,) = one.diff(other)
    assert line.startswith(name)
    assert one.folder_name != other.folder_name


NAMES = st.text(min_size=1).filter(str.strip)
KEYS = st.builds(
    StoreKey,
    model=NAMES,
    revision=NAMES,
    processor=st.dictionaries(st.text(), st.integers() | st.booleans() | st.text(), max_size=3).map(json.dumps),
    patches=st.integers(1, 2048),
    text_length=st.integers(1, 128),
    dtype=st.sampled_from(["float16", "float32"]),
    manifest_sha256=st.sampled_from(["00" * 32, "1f" * 32]),
    compute_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


@given(KEYS.filter(lambda key: key.model.isprintable()), KEYS.filter(lambda key: key.model.isprintable()))
def test_digest_is_identity(one, other):
    assert (one == other) == (one.digest == other.digest) == (one.diff(other) == [])
    again = StoreKey.from_dict(json.loads(json.dumps(one.to_dict())))
    assert (again, again.digest, again.text_digest) == (one, one.digest, one.text_digest)
    assert set(one.folder_name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")


def test_processor_spelling_does_not_count(kit):
    assert kit.key(processor='{"a":1,"b":[2]}') == kit.key(processor='{ "b": [2],\n "a": 1 }')


def test_processor_difference_names_the_setting(kit):
    one, other = kit.key(processor='{"mean": 1, "std": 2}'), kit.key(processor='{"mean": true, "size": 3, "std": 2}')
    assert one.diff(other) == ["processor mean: 1 against true", "processor size: not set against 3"]


def test_folder_name(kit):
    key = kit.key()
    assert key.folder_name == f"siglip2-base-patch16-naflex-p256-float16-{key.digest[:12]}"
    assert kit.key(model="../..").folder_name.startswith("model-p256")
    assert kit.key(model="/tmp/My Model/").folder_name.startswith("my-model-p256")


BAD = [
    ("model", " "),
    ("revision", None),
    ("processor", "{"),
    ("processor", '{"a": NaN}'),
    ("patches", 0),
    ("patches", True),
    ("text_length", "64"),
    ("dtype", "bfloat16"),
    ("compute_dtype", "float64"),
    ("manifest_sha256", "AB" * 32),
    ("format_version", 1.0),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_field_is_refused(kit, name, value):
    with pytest.raises(StoreError, match=f"bad store key: {name}: got"):
        kit.key(**{name: value})


def test_unknown_and_missing_fields_are_refused(kit):
    whole = kit.key().to_dict()
    part = {name: value for name, value in whole.items() if name != "patches"}
    for wrong in (part, whole | {"colour": 1}, [1]):
        with pytest.raises(StoreError, match="other fields"):
            StoreKey.from_dict(wrong)
