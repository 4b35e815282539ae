"""What needs a GPU: extraction and training there agree with the CPU's, and survive a device that is full."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmcli.cache import Store
from mmcli.heads.decompose import log_norms
from mmcli.heads.model import make_head
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.extraction.encoder import Encoder
from mmcli.pipeline.extraction.extract import ExtractPlan, extract_here
from mmcli.pipeline.extraction.images import Grid
from mmcli.pipeline.training.data import Split
from mmcli.pipeline.training.loop import Hooks, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


def extracted(miniature, out: Path, device: str, **options) -> Store:
    config = load_config(
        options={"model.siglip2_variant": str(miniature.model), "model.max_num_patches": 64, "hardware.device": device}
    )
    plan = ExtractPlan(data=miniature.data, out=out, dtype="float32", shard_rows=16)
    assert extract_here(config, plan, **options).finished
    return Store.open(out)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def test_half_precision_on_a_gpu_points_as_float32_on_a_cpu_does(miniature, tmp_path: Path) -> None:
    here, present = (extracted(miniature, tmp_path / device, device) for device in ("cpu", "cuda"))
    assert present.key.compute_dtype in {"bfloat16", "float16"}
    assert here.digest != present.digest
    a, b = here.load(), present.load()
    assert cosine(a.v_img, b.v_img).min() > 0.9999
    real = a.norm_txt > 0
    assert cosine(a.v_txt[real], b.v_txt[real]).min() > 0.9999


def test_two_processes_on_the_gpus_fill_one_store(miniature, tmp_path: Path) -> None:
    item, two = (
        extracted(miniature, tmp_path / "a", "cuda:0"),
        extracted(miniature, tmp_path / "b", "cuda", processes=2),
    )
    np.testing.assert_allclose(item.load().norm_img, two.load().norm_img, rtol=1e-2)


def test_a_full_gpu_halves_the_passes(miniature) -> None:
    """Room for the towers and half of what a batch takes: what does not fit is done again in halves."""
    encoder, grid = Encoder.load(str(miniature.model), patches=64, device=torch.device("cuda:0")), Grid(8, 8)
    full = encoder.batch_tokens
    pixels = np.random.default_rng(0).integers(0, 256, (full // 64, 64, encoder.spec.width), np.uint8)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    wanted = encoder.image_features(pixels, grid).cpu()
    need = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.75 * need) / total)
    try:
        halved = encoder.image_features(pixels, grid).cpu()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert encoder.batch_tokens < full
    np.testing.assert_allclose(halved, wanted, rtol=1e-2, atol=1e-2)


def trained(device: str, monkeypatch, *, graphs: bool = True, **options):
    """A head trained on made data, and the losses of its epochs."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (400, 5)).astype(np.uint8)
    v = (labels @ rng.normal(size=(5, 12)) + 0.3 * rng.normal(size=(400, 12))).astype(np.float32)
    place = torch.device(device)
    split = Split.place(v, np.repeat(v[:, None], 5, 1), np.full(400, 5), labels, place)
    config = load_config(
        options={
            "fusion.mlp_dims": [32, 16],
            "hash.bits": 16,
            "classifier.num_classes": 5,
            "training.num_epochs": 4,
            "training.batch_size": 30,
            "training.mixed_precision": False,
            **options,
        }
    )
    torch.manual_seed(1)
    head = make_head("fusion", config.fusion, config.hash, config.classifier, width=12)
    head.fit_log_norms(log_norms(split.v_img.cpu(), split.v_txt[:, 0].cpu()))
    head.to(place)
    if not graphs:
        monkeypatch.setattr("mmcli.pipeline.training.step.WARM_UP", 10**9)
    hooks = Hooks(monitor=lambda _: {"val_mAP": 0.5}, on_epoch=lambda *_: None)
    with Progress().task("", 1) as task:
        result = fit(head, split, config, hooks, task=task)
    return head, [record["loss"] for record in result.history]


@pytest.mark.parametrize("options", [{}, {"training.accumulation_steps": 2, "training.ema_decay": 0.9}])
def test_a_step_replayed_as_a_graph_is_the_step(monkeypatch, options) -> None:
    replayed, eager = trained("cuda", monkeypatch, **options), trained("cuda", monkeypatch, graphs=False, **options)
    assert replayed[1] == pytest.approx(eager[1], rel=1e-4)


def test_without_dropout_a_gpu_trains_as_a_cpu_does(monkeypatch) -> None:
    options = {"fusion.dropout": 0.0, "fusion.input_dropout": 0.0}
    on_gpu, on_cpu = (trained(device, monkeypatch, **options)[1] for device in ("cuda", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_half_precision_trains_on_a_gpu(monkeypatch) -> None:
    half = trained("cuda", monkeypatch, **{"training.mixed_precision": True})
    assert half[1] == pytest.approx(trained("cuda", monkeypatch)[1], rel=0.05)
    assert {parameter.dtype for parameter in half[0].parameters()} == {torch.float32}
