"""A benchmark runs whole, small; its ratios are of its own figures; what it times is the same work."""

import json

import numpy as np
import pytest
import torch

from mmcli.heads.losses import total_loss
from mmcli.pipeline.bench import plain as bench_plain
from mmcli.pipeline.bench import train as bench_train
from mmcli.pipeline.bench.data import SIZES, base_config, draw_photographs, write_captions
from mmcli.pipeline.bench.harness import Case, best_of
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.extraction.images import image_size


def test_bench_extract_gives_ratios_and_says_what_bounds_it(mmcli, miniature) -> None:
    code, out, err = mmcli(
        "bench",
        "extract",
        "--model",
        miniature.model,
        "--patches",
        64,
        "--images",
        miniature.data / "val2014",
        "--n-images",
        6,
        "--n-captions",
        7,
        "--repeats",
        1,
        "--device",
        "cpu",
        "--json",
    )
    assert code == 0, err
    result = json.loads(out)
    cases = {case["case"]: case for case in result["cases"]}
    assert {"images", "captions", "image work, one core"} <= cases.keys()
    for case in cases.values():
        assert case["ratio_plain"] == pytest.approx(case["ours_per_s"] / case["plain_per_s"])
        if case["ceiling_per_s"] is not None:
            assert case["ratio_ceiling"] == pytest.approx(case["ours_per_s"] / case["ceiling_per_s"])
    wanted = 123_287 / cases["images"]["ours_per_s"] + 616_767 / cases["captions"]["ours_per_s"]
    assert result["coco_seconds"] == pytest.approx(wanted)
    assert result["bottleneck"] in {"reading images", "the model", "writing"}
    assert "cores" in result["machine"]


def test_bench_train_gives_ratios_and_says_what_an_epoch_takes(mmcli, here) -> None:
    code, out, err = mmcli(
        "bench",
        "train",
        "--store",
        next((here / "data" / "cache").iterdir()),
        "--steps",
        4,
        "--repeats",
        1,
        "--device",
        "cpu",
        "--set",
        "fusion.mlp_dims=[32, 16]",
        "--set",
        "knn.K=5",
        "--json",
    )
    assert code == 0, err
    result = json.loads(out)
    cases = {case["case"]: case for case in result["cases"]}
    assert {"training, batch 64", "training, batch 1,024"} <= cases.keys()
    for case in cases.values():
        assert case["ratio_plain"] == pytest.approx(case["ours_per_s"] / case["plain_per_s"])
    assert result["epoch_s"] == pytest.approx(40 / cases["training, batch 64"]["ours_per_s"])
    assert result["validation_share"] == pytest.approx(result["validation_s"] / result["epoch_s"])
    assert result["import_torch_s"] > 0
    assert result["first_step_s"] > 0


def test_the_ceiling_multiplies_in_the_precision_of_a_step(here, monkeypatch) -> None:
    store = next((here / "data" / "cache").iterdir())
    config = load_config(options={"fusion.mlp_dims": [32, 16], "knn.K": 5, "hardware.device": "cpu"})
    multiply, dtypes = torch.mm, set()

    def seen(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        dtypes.add((left.dtype, right.dtype))
        return multiply(left, right)

    for amx in (True, False):
        monkeypatch.setattr("mmcli.pipeline.core.device.has_amx", lambda amx=amx: amx)
        monkeypatch.setattr(torch, "mm", seen)
        prepared = bench_train.prepare_training(config, store, Progress())
        setting = bench_train._Setting(prepared=prepared, steps=1)
        wanted = torch.bfloat16 if amx else torch.float32
        dtypes.clear()
        next(bench_train._products(setting, 8))
        assert dtypes == {(wanted, wanted)}, amx


def test_the_plain_loop_and_ours_train_the_same_head(here) -> None:
    """Both lower the same loss on the same images: the ratio is of like with like."""
    store = next((here / "data" / "cache").iterdir())
    config = load_config(options={"fusion.mlp_dims": [32, 16], "knn.K": 5, "hardware.device": "cpu"})
    setting = bench_train._Setting(prepared=bench_train.prepare_training(config, store, Progress()), steps=4)
    items = bench_plain._Items(setting.train)
    assert len(items) == len(setting.train) == 40
    v_img, v_txt, y = items[3]
    wanted = setting.train.batch(torch.tensor([3]), torch.tensor([0]))
    assert np.array_equal(v_img, wanted[0][0].numpy())
    assert np.array_equal(y, wanted[2][0].numpy())
    row, n = int(setting.train.rows[3]), int(setting.train.captions_of[3])
    assert any(np.array_equal(v_txt, caption.float().numpy()) for caption in setting.train.v_txt[row, :n])
    head = setting.prepared.make_head(setting.train)
    v_img, v_txt, y = setting.train.batch(torch.arange(16), torch.zeros(16, dtype=torch.int64))
    output = head.train()(v_img, v_txt)
    assert output.prefix_logits
    plain, ours = bench_plain.plain_loss(config.loss, output, y), total_loss(config.loss, output, y).loss
    torch.testing.assert_close(plain, ours)
    before = head.classifier.weight.clone()
    next(bench_plain.plain_steps(head, setting.train, config, 16, workers=0))
    assert not torch.equal(before, head.classifier.weight)


def test_the_best_round_counts_and_ways_take_turns() -> None:
    order: list[str] = []
    best = best_of({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 3
    assert set(best) == {"a", "b"}
    case = Case(name="x", unit="things", plain=2.0, ours=3.0)
    assert (case.ratio_plain, case.ratio_ceiling) == (1.5, None)


def test_photographs_have_cocos_sizes_and_bytes(tmp_path) -> None:
    draw_photographs(tmp_path / "a", 12, seed=3)
    draw_photographs(tmp_path / "b", 12, seed=3)
    paths = sorted((tmp_path / "a").iterdir())
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in sorted((tmp_path / "b").iterdir())]
    known = {(height, width) for width, height, _ in SIZES}
    sizes = [image_size(path) for path in paths]
    assert set(sizes) <= known
    bytes_a_pixel = sum(path.stat().st_size for path in paths) / sum(width * height for height, width in sizes)
    assert 0.45 < bytes_a_pixel < 0.65  # 0.56 in the real slice


def test_captions_are_distinct_and_the_towers_have_base_size() -> None:
    captions = write_captions(23)
    assert len(set(captions)) == 23
    config = base_config(1000)
    for tower in (config.vision_config, config.text_config):
        sizes = (tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers, tower.num_attention_heads)
        assert sizes == (768, 3072, 12, 12)
    assert (config.vision_config.patch_size, config.text_config.max_position_embeddings) == (16, 64)
