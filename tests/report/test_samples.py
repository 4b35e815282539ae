"""The sheet of samples: reproducible, and whole whatever an image or a caption is."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from kit.reports import make_kit


def test_a_sheet_takes_any_caption_and_names_a_broken_image(mmcli, tmp_path: Path) -> None:
    make_kit(tmp_path, rows=False)
    words = ("samples", "--data", "data", "--split", "test", "--n", 100, "--json")
    code, out, err = mmcli(*words)
    assert code == 0, err
    found = json.loads(out)
    assert sorted(found["image_ids"]) == list(range(2000, 2060))  # all there are, each once
    assert len(found["unreadable"]) == 1
    assert "2005.jpg" in found["unreadable"][0]
    pixels = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB"))
    assert pixels.std() > 10
    code, out, err = mmcli(*words)
    assert (code, out) == (2, "")
    assert "--force" in err


def test_the_seed_draws_the_same_images_and_another_seed_others(mmcli, tmp_path: Path) -> None:
    make_kit(tmp_path, rows=False)

    def drawn(*more: object) -> list[int]:
        code, out, err = mmcli("samples", "--data", "data", "--n", 3, "--out", "x/s.png", "--force", "--json", *more)
        assert code == 0, err
        return json.loads(out)["image_ids"]

    assert drawn() == drawn() == drawn("--seed", 42)
    assert drawn() != drawn("--seed", 43)
    for wrong in (("--split", "tets"), ("--out", "s.jpg"), ("--data", "nowhere")):
        code, out, err = mmcli("samples", "--data", "data", *wrong)
        assert (code, out, err.count("\n")) == (2, "", 1)
