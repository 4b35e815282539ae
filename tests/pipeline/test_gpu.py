"""What needs a GPU: extraction there agrees with the CPU's, uses every GPU, and survives a device that is full."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmcli.cache import Store
from mmcli.pipeline.config import load_config
from mmcli.pipeline.extract import ExtractPlan
from mmcli.pipeline.fleet import extract_here

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
    here, there = (extracted(miniature, tmp_path / device, device) for device in ("cpu", "cuda"))
    assert there.key.compute_dtype in {"bfloat16", "float16"}
    assert here.digest != there.digest
    a, b = here.load(), there.load()
    assert cosine(a.v_img, b.v_img).min() > 0.9999
    real = a.norm_txt > 0
    assert cosine(a.v_txt[real], b.v_txt[real]).min() > 0.9999


def test_two_processes_on_the_gpus_of_this_machine_fill_one_store(miniature, tmp_path: Path) -> None:
    one, two = extracted(miniature, tmp_path / "a", "cuda:0"), extracted(miniature, tmp_path / "b", "cuda", processes=2)
    np.testing.assert_allclose(one.load().norm_img, two.load().norm_img, rtol=1e-2)


def test_a_full_gpu_halves_the_passes(miniature, tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(max(0, free - 200 * 2**20), dtype=torch.uint8, device="cuda")
    store = extracted(miniature, tmp_path / "s", "cuda:0")
    del hog
    assert (store.load().norm_img > 0).all()
