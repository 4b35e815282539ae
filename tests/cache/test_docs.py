"""The page on the format tells the truth."""

import json
import re

import numpy as np

from mmcli.cache import FORMAT_VERSION, Store


def test_the_code_on_the_page_reads_a_store(kit, tmp_path, repo):
    page = (repo / "docs" / "cache-format.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    data = kit.Data()
    names = {"store": str(data.write(tmp_path / "s", kit.key()))}
    exec(code, names)
    assert names["index"].column("image_id").to_pylist() == data.ids.tolist()
    wanted = vars(Store.open(tmp_path / "s").load())
    assert set(names["arrays"]) == set(wanted)
    for name, values in names["arrays"].items():
        np.testing.assert_array_equal(values, wanted[name])
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_the_page_names_every_key_of_the_manifest(kit, tmp_path, repo):
    page = (repo / "docs" / "cache-format.md").read_text()
    document = json.loads((kit.Data().write(tmp_path / "s", kit.key()) / "manifest.json").read_text())
    for names in (document, document["key"], document["counts"], document["index"], document["shards"][0]):
        for name in names:
            assert f"`{name}`" in page, name
    assert f"# The store's format, version {FORMAT_VERSION}\n" in page
