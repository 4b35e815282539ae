"""A benchmark runs whole, small; its ratios are of its own figures; what it times is the same work."""

import json

import numpy as np
import pytest
import torch

from mmcli.pipeline.bench import plain as bench_plain
from mmcli.pipeline.bench import train as bench_train
from mmcli.pipeline.bench.data import SIZES, base_config, draw_photographs, write_captions
from mmcli.pipeline.bench.harness import Case, best_of
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.extraction.images import image_size


def test_bench_extract_gives_ratios_and_the_bottleneck(mmcli, miniature) -> None:
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


def test_bench_train_gives_ratios_and_the_epoch(mmcli, here) -> None:
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
    assert {"training, batch 64", "training, batch 1,024"} == cases.keys()
    for case in cases.values():
        assert case["ratio_plain"] == pytest.approx(case["ours_per_s"] / case["plain_per_s"])
    assert result["epoch_s"] == pytest.approx(40 / cases["training, batch 64"]["ours_per_s"])
    assert result["validation_share"] == pytest.approx(result["validation_s"] / result["epoch_s"])


def test_bench_ablate_gives_ratios(mmcli, here) -> None:
    store = next((here / "data" / "cache").iterdir())
    small = ("--set", "fusion.mlp_dims=[32, 16]", "--set", "knn.K=5", "--epochs", 1, "--device", "cpu")
    code, out, err = mmcli("bench", "ablate", "A3", "--store", store, *small, "--json")
    assert code == 0, err
    result = json.loads(out)
    (case,) = result["cases"]
    assert case["ratio_plain"] == pytest.approx(result["plain_s"] / result["wall_s"])
    assert case["ratio_ceiling"] == pytest.approx(result["train_s"] / result["wall_s"])
    assert (result["n_rows"], result["n_trainings"], result["table_path"]) == (3, 1, None)


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
        setting = bench_train.Setting(prepared=prepared)
        wanted = torch.bfloat16 if amx else torch.float32
        dtypes.clear()
        next(bench_train.product_steps(setting, 8))
        assert dtypes == {(wanted, wanted)}, amx


def test_the_plain_loop_and_ours_train_the_same_head(here) -> None:
    """Both lower the same loss on the same images: the ratio is of like with like."""
    store = next((here / "data" / "cache").iterdir())
    config = load_config(options={"fusion.mlp_dims": [32, 16], "knn.K": 5, "hardware.device": "cpu"})
    setting = bench_train.Setting(prepared=bench_train.prepare_training(config, store, Progress()))
    items = bench_plain.Items(setting.train)
    assert len(items) == len(setting.train) == 40
    v_img, v_txt, y = items[3]
    wanted = setting.train.batch(torch.tensor([3]), torch.tensor([0]))
    assert np.array_equal(v_img, wanted[0][0].numpy())
    assert np.array_equal(y, wanted[2][0].numpy())
    row, n = int(setting.train.rows[3]), int(setting.train.captions_of[3])
    assert any(np.array_equal(v_txt, caption.float().numpy()) for caption in setting.train.v_txt[row, :n])
    head = setting.make_head()
    before = head.classifier.weight.clone()
    next(bench_plain.plain_steps(head.train(), setting.train, config, 16, workers=0))
    assert not torch.equal(before, head.classifier.weight)


def test_the_best_round_counts_and_ways_take_turns() -> None:
    order: list[str] = []
    best = best_of({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 3
    assert set(best) == {"a", "b"}
    case = Case(name="x", unit="things", plain=2.0, ours=3.0)
    ratios = case.to_json()
    assert (ratios["ratio_plain"], ratios["ratio_ceiling"]) == (1.5, None)


def test_photographs_have_cocos_sizes_and_bytes(tmp_path) -> None:
    draw_photographs(tmp_path / "a", 12, seed=3)
    draw_photographs(tmp_path / "b", 12, seed=3)
    paths = sorted((tmp_path / "a").iterdir())
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in sorted((tmp_path / "b").iterdir())]
    sizes = [image_size(path) for path in paths]
    assert set(sizes) <= {(height, width) for width, height, _ in SIZES}
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
