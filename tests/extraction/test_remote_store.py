"""The command line with a store behind a URL: extracted, extended, checked and trained from as one in a folder."""

import json
import shutil
import uuid

import pytest

from mmcli.cache import Store, place
from mmcli.pipeline.data.manifest import read_manifest

pytest.importorskip("upath", reason="universal_pathlib is not installed: pip install -e '.[remote]'")


def test_every_command_takes_a_url_for_a_store(mmcli, miniature, tmp_path) -> None:
    data, url = tmp_path / "data", f"memory://{uuid.uuid4().hex}/a/store"
    shutil.copytree(miniature.data, data)
    paths = read_manifest(data / "manifest.parquet").paths
    (data / paths[3]).unlink()
    words = (
        "extract",
        "--model",
        miniature.model,
        "--data",
        data,
        "--patches",
        64,
        "--device",
        "cpu",
        "--json",
        "--batch-tokens",
        256,
        "--workers",
        0,
        "--on-error",
        "skip",
    )
    result = {}
    for out in (url, str(tmp_path / "local")):
        code, said, errors = mmcli(*words, "--out", out)
        assert code == 0, errors
        result[out] = json.loads(said)
        assert (result[out]["store"], result[out]["n_encoded"], len(result[out]["skipped"])) == (out, 59, 1)
    for path in (tmp_path / "local").glob("*.[hp]*"):
        assert (place(url) / path.name).read_bytes() == path.read_bytes()
    assert Store.open(place(url)).skipped == Store.open(tmp_path / "local").skipped
    (place(url) / "text-00000.h5").unlink()  # a part is lost: it alone is made again
    code, said, _ = mmcli(*words, "--out", url)
    assert (code, json.loads(said)["n_encoded"]) == (0, 0)
    for command in (("cache", "verify"), ("cache", "info"), ("train-head", "--epochs", 1, "--device", "cpu")):
        code, said, errors = mmcli(*command, "--store", url, "--json")
        assert code == 0, errors
        assert url in json.loads(said).values(), command
    code, _, errors = mmcli("cache", "info", "--store", "no-such-kind://bucket/x")
    assert code == 2
    assert "cannot reach a URL: no-such-kind://bucket/x" in errors
