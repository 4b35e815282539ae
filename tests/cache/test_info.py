"""describe: histograms, sizes and skipped images, against the whole arrays; it never holds all embeddings."""

import json
from itertools import pairwise

import numpy as np
import pytest

from mmcli.cache import Store, describe


def fill(kit, folder, skipped):
    data = kit.Data()
    data.v_img[skipped] = 0
    with data.writer(folder, kit.key()) as writer:
        for shard in writer.missing("image"):
            rows = [row - shard.start for row in skipped if shard.start <= row < shard.stop]
            writer.write_image(shard, v_img=data.v_img[shard.start : shard.stop], skipped=rows)
        data.fill(writer)
        return writer.finish(lambda row: f"reason {row}")


def test_the_new_figures(kit, tmp_path):
    folder = fill(kit, tmp_path / "s", [1, 6])
    facts, arrays, index = describe(folder), Store.open(folder).load(), Store.open(folder).index.to_pylist()
    assert json.loads(json.dumps(facts)) == facts
    real = np.arange(5) < arrays.n_captions[:, None]
    for name, norms in (("norm_img", arrays.norm_img[arrays.norm_img > 0]), ("norm_txt", arrays.norm_txt[real])):
        found = facts[f"histogram_{name}"]
        edges, counts = found["edges"], found["counts"]
        assert len(edges) == len(counts) + 1
        assert (edges[0], edges[-1]) == pytest.approx((norms.min(), norms.max()))
        plain = [sum(low <= norm < high for norm in norms.astype(float)) for low, high in pairwise(edges)]
        plain[-1] += 1  # the greatest norm is in the last bin
        assert counts == plain
    assert facts["skipped_images"] == [
        {"image_id": index[row]["image_id"], "path": index[row]["path"], "row": row, "reason": f"reason {row}"}
        for row in (1, 6)
    ]
    for part in ("image", "text"):
        assert facts[f"bytes_{part}"] == sum(path.stat().st_size for path in folder.glob(f"{part}-*.h5"))


def test_the_embeddings_are_not_all_loaded(kit, tmp_path, monkeypatch):
    folder = kit.Data().write(tmp_path / "s", kit.key())
    monkeypatch.delattr(Store, "load")
    assert describe(folder)["norm_img"]["min"] > 0
