"""Parts of finetuning by themselves: views of images, the memory plan, the team, settings, the benchmark."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.distributed.tensor import DTensor

from mmcli import InputError
from mmcli.heads.losses import total_loss
from mmcli.pipeline.core.config import FinetuneConfig, load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.data.manifest import read_manifest
from mmcli.pipeline.extraction.encoder import Encoder
from mmcli.pipeline.extraction.images import Grid, PatchSpec, cut, read_patches
from mmcli.pipeline.finetuning.batches import SMALLEST_SIDE, TowerBatches, draw_views, flip
from mmcli.pipeline.finetuning.distributed import ProcessGroup, Shards, open_group
from mmcli.pipeline.finetuning.embeddings import LiveStore
from mmcli.pipeline.finetuning.memory import kept_bytes, plan_memory
from mmcli.pipeline.finetuning.settings import resolve_finetune, unfreeze_of
from mmcli.pipeline.finetuning.towers import Towers
from mmcli.pipeline.training.setup import draw_head


@given(rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=20, unique=True), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_views_depend_on_seed_epoch_and_row_alone(rows: list[int], seed: int) -> None:
    views = draw_views(np.array(rows), seed=seed, epoch=3)
    for left, upper, right, lower in views.boxes:
        assert 0 <= left < right <= 1
        assert 0 <= upper < lower <= 1
        assert right - left == pytest.approx(lower - upper, abs=1e-9)
        assert right - left >= SMALLEST_SIDE - 1e-9
    alone = draw_views(np.array(rows[-1:]), seed=seed, epoch=3)
    assert (alone.boxes[0], alone.mirrored[0]) == (views.boxes[-1], views.mirrored[-1])
    assert draw_views(np.array(rows), seed=seed, epoch=4).boxes != views.boxes


def test_a_part_of_an_image_is_what_pillow_crops_and_resizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (120, 200, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    spec = PatchSpec(side=16, budget=64, fixed=None, resample=2)
    grid = spec.grid(120, 200)
    out = np.empty((grid.tokens, spec.width), np.uint8)
    read_patches(tmp_path / "image.png", grid, spec, out, (0.25, 0.5, 0.75, 1.0))
    size = (grid.columns * 16, grid.rows * 16)
    wanted = image.crop((50, 60, 150, 120)).resize(size, Image.Resampling.BILINEAR)
    # A box sees the pixels beyond its edges that a crop has lost: only there may they differ.
    inner = np.zeros((grid.rows, grid.columns), bool)
    inner[1:-1, 1:-1] = True
    assert np.array_equal(out[inner.ravel()], cut(np.asarray(wanted), grid, 16)[inner.ravel()])


def test_a_mirrored_image_is_mirrored_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (3, 48, 80, 3), dtype=np.uint8)
    grid = Grid(3, 5)
    patches = np.stack([cut(image, grid, 16) for image in images])
    seen = flip(patches, grid, np.array([True, False, True]))
    wanted = np.stack([cut(image, grid, 16) for image in (images[0, :, ::-1], images[1], images[2, :, ::-1])])
    assert np.array_equal(seen, wanted)
    assert np.array_equal(flip(seen, grid, np.array([True, False, True])), patches)


def test_what_a_graph_keeps_is_counted_once() -> None:
    """``y = (x w) ** 2 * x`` keeps x, w and the product; x is kept twice and counted once."""
    w = torch.ones(1000, requires_grad=True)
    x = {n: torch.ones(n, 1000) for n in (1, 2)}
    counted = [kept_bytes(lambda n: (x[n] * w).square() * x[n], n) for n in (1, 2)]
    assert counted[1] - counted[0] == 2 * 4000


def test_the_plan_counts_parameters_and_activations(miniature) -> None:
    config = load_config(options={"model.siglip2_variant": str(miniature.model), "model.max_num_patches": 64})
    planned = plan_memory(resolve_finetune(config, unfreeze="last-1", towers="both", start=None), data=miniature.data)
    parts = Encoder.parts(str(miniature.model), patches=64, device=torch.device("cpu"))
    towers = Towers(parts, FinetuneConfig(unfreeze="last-1"))
    trained = sum(value.numel() for value in towers.trained.values())
    head = planned.n_parameters - sum(value.numel() for value in parts.model.parameters())
    assert planned.n_trained == head + trained
    off, on = planned.needs
    assert 0 < on.image_bytes < off.image_bytes
    assert on.largest_batch > off.largest_batch > 256
    assert planned.fits
    record = json.loads(json.dumps(planned.to_json()))
    assert record["needs"][1]["checkpointing"] is True
    image = plan_memory(resolve_finetune(config, unfreeze="all", towers="image", start=None), data=miniature.data)
    assert (image.needs[0].caption_bytes, image.needs[0].image_bytes > off.image_bytes) == (0, True)
    none = plan_memory(resolve_finetune(config, unfreeze="none", towers="both", start=None), data=miniature.data)
    assert (none.needs, none.n_trained) == ((), head)


def test_the_plan_has_the_memory_of_the_container(miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcli.pipeline.finetuning.memory.free_memory", lambda: 1 << 20)
    config = load_config(options={"model.siglip2_variant": str(miniature.model), "model.max_num_patches": 64})
    planned = plan_memory(resolve_finetune(config, unfreeze="last-1"), data=miniature.data)
    assert (planned.free_bytes, planned.fits) == (1 << 20, False)


@pytest.mark.parametrize(
    ("tree", "option", "wanted"),
    [
        ({}, None, "last-2"),
        ({"model.freeze_towers": True}, None, "none"),
        ({"model.freeze_towers": False}, None, "last-2"),
        ({"model.freeze_towers": True}, "all", "all"),
        ({"model.freeze_towers": True, "finetune.unfreeze": "last-1"}, None, "last-1"),
        ({"finetune.unfreeze": "full"}, None, "all"),
        ({"finetune.unfreeze": None}, None, "none"),
    ],
)
def test_what_is_unfrozen_follows_file_and_option(tree, option: str | None, wanted: str) -> None:
    config = load_config(options=tree)
    assert unfreeze_of(config, option) == wanted
    settled = resolve_finetune(config, unfreeze=wanted, towers="both", start=None)
    assert settled.model.freeze_towers is (wanted == "none")


def test_a_head_of_one_modality_takes_its_tower() -> None:
    config = load_config(options={"fusion.inputs": "image"})
    assert resolve_finetune(config, unfreeze="all", towers="both", start=None).finetune.towers == "image"
    with pytest.raises(InputError, match="does not read"):
        resolve_finetune(config, unfreeze="all", towers="text", start=None)


def test_a_single_process_is_a_group_of_its_own() -> None:
    with open_group("cpu") as group:
        assert (group.size, group.is_first, group.broadcast_text("x"), group.maximum(3)) == (1, True, "x", 3)
        summed = torch.ones(2)
        group.all_reduce([summed])
        assert summed.tolist() == [1.0, 1.0]


def test_a_sharded_block_is_whole_only_while_it_computes(miniature) -> None:
    """Between its forward and its backward pass a process has its part alone; that is what sharding is for."""
    import torch.distributed as dist

    config = load_config(options={"finetune.unfreeze": "all"})
    cpu = torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        towers = Towers(Encoder.parts(str(miniature.model), patches=64, device=cpu), config.finetune)
        shards = Shards(towers, ProcessGroup(cpu), sharded=True)
        side = towers.sides["image"]
        features = side(torch.zeros((2, 16, 768), dtype=torch.uint8), Grid(4, 4))
        blocks = {name for name in towers.trained if name.startswith("vision_model.encoder.")}
        now = dict(towers.parts.model.named_parameters())
        assert blocks
        assert all(isinstance(now[name], DTensor) for name in blocks)
        features.sum().backward()
        shards.take_gradients()
        assert all(shards.local[name].grad is not None for name in blocks)
    finally:
        dist.destroy_process_group()


def test_the_benchmark_times_both_ways(mmcli, miniature) -> None:
    words = ("--model", miniature.model, "--patches", 64, "--n-images", 8, "--batch-size", 4, "--repeats", 1)
    code, out, err = mmcli(
        "bench", "finetune", *words, "--workers", 0, "--unfreeze", "last-2", "--device", "cpu", "--json"
    )
    assert code == 0, err
    (case,) = json.loads(out)["cases"]
    assert case["ratio_plain"] == pytest.approx(case["ours_per_s"] / case["plain_per_s"])
    assert set(json.loads(out)["memory"]["last-2"]) == {"plain_peak_bytes", "ours_peak_bytes"}
    assert mmcli("bench", "finetune", "--unfreeze", "some")[0] == 2


@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_has_the_gradient_of_one_graph(miniature, parts: int) -> None:
    """Sixteen images of several grids through the plain model, padded and masked, head and loss on top, one backward."""
    options = {
        "model.siglip2_variant": str(miniature.model),
        "model.max_num_patches": 64,
        "preset": "plan",
        "fusion.dropout": 0.0,
        "fusion.mlp_dims": [32, 16],
        "finetune.unfreeze": "last-1",
        "data.num_workers": 0,
        "training.batch_size": 16 // parts,
        "training.accumulation_steps": parts,
        "hash.batch_norm": True,
    }
    config = load_config(options=options)
    listing, cpu = read_manifest(miniature.data / "manifest.parquet"), torch.device("cpu")
    towers = Towers(Encoder.parts(str(miniature.model), patches=64, device=cpu), config.finetune)
    head = draw_head(config, width=64, device=cpu).train()
    plain_head = copy.deepcopy(head)
    places, caption = torch.arange(16), torch.arange(16) % 2
    with LiveStore(
        listing, miniature.data, towers.parts, config, captions=1, group=ProcessGroup(cpu), progress=Progress()
    ) as store:
        train, batches = store.splits["train"], TowerBatches(towers, store, config)
        rows = train.rows[places].numpy()
        batches.begin(1, [rows])
        v_img, v_txt, y = batches.embed(train, places, caption)
        total_loss(config.loss, head(v_img, v_txt), y).loss.backward()
        batches.backward()
    plain = Encoder.parts(str(miniature.model), patches=64, device=cpu).model
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in towers.trained)
    processor = transformers.AutoProcessor.from_pretrained(miniature.model)
    images = [Image.open(miniature.data / listing.paths[row]).convert("RGB") for row in rows]
    pixels = processor(images=images, return_tensors="pt", max_num_patches=64)
    assert len({tuple(shape) for shape in pixels["spatial_shapes"].tolist()}) > 1
    ids = store.encoder.tokenize([listing.captions[row][which] for row, which in zip(rows, caption, strict=True)])
    features = plain.get_image_features(**pixels).pooler_output, plain.get_text_features(input_ids=ids).pooler_output
    total_loss(config.loss, plain_head(*features), y).loss.backward()
    reference = dict(plain.named_parameters())
    for name, parameter in towers.trained.items():
        slope = reference[name].grad
        torch.testing.assert_close(parameter.grad, slope, atol=1e-6 + 2e-3 * float(slope.abs().max()), rtol=2e-3)
    for mine, theirs in zip(head.parameters(), plain_head.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-3)
