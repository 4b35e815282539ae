"""Finetuned towers beat frozen ones on the miniature: three seeds, paired over the test images. Takes ten minutes."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmcli.heads.metrics import mean_average_precision
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.results import read_codes
from mmcli.pipeline.data.miniature import make_dataset
from mmcli.pipeline.data.prepare import prepare
from mmcli.pipeline.evaluation.knn_eval import knn_eval
from mmcli.pipeline.extraction.miniature_model import make_checkpoint
from mmcli.pipeline.finetuning.finetune import finetune

SEEDS = (1, 2, 3)
RESAMPLES = 1000


def scores(run: Path, method: str) -> np.ndarray:
    arrays = load_file(run / "scores" / f"{method}-test.safetensors")
    return next(value for name, value in arrays.items() if value.ndim == 2 and name != "labels")


@pytest.mark.slow
def test_trained_towers_improve_on_the_frozen_ones(tmp_path: Path) -> None:
    """A head on frozen towers, then the towers too: mAP of neighbours and classifier, mean over seeds of the difference."""
    data = make_dataset(tmp_path / "data")
    prepare(data)
    model = make_checkpoint(data, tmp_path / "model")
    options = {
        "preset": "small",
        "model.siglip2_variant": str(model),
        "model.max_num_patches": 64,
        "hardware.device": "cpu",
        "training.early_stopping_patience": 0,
        "loss.cosine_weight": 0.0,
        "optimizer.lr_towers": 1e-3,
    }
    runs: dict[str, list[Path]] = {"none": [], "last-2": [], "all": []}
    for seed in SEEDS:
        config = load_config(options=options | {"hardware.seed": seed, "training.num_epochs": 100})
        start = finetune(config, data=data, unfreeze="none", out=tmp_path / f"none-{seed}").run
        config = load_config(options=options | {"hardware.seed": seed, "training.num_epochs": 12})
        tuned = [
            finetune(config, data=data, unfreeze=one, start=start.folder, out=tmp_path / f"{one}-{seed}").run
            for one in ("last-2", "all")
        ]
        for name, run in zip(runs, (start, *tuned), strict=True):
            knn_eval(load_config(run.folder / "config.yaml"), run=run)
            runs[name].append(run.folder)
    labels = read_codes(runs["none"][0], "test").labels
    rng = np.random.default_rng(0)
    resamples = [np.arange(len(labels)), *(rng.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES))]
    for method in ("knn", "classifier"):
        for name in ("last-2", "all"):
            pairs = [(scores(a, method), scores(b, method)) for a, b in zip(runs[name], runs["none"], strict=True)]
            gains = [
                np.mean(
                    [
                        mean_average_precision(tuned[at], labels[at]) - mean_average_precision(frozen[at], labels[at])
                        for tuned, frozen in pairs
                    ]
                )
                for at in resamples
            ]
            assert gains[0] > 0, (method, name)
            # Of last-2 the lower end was 0.005 where this was written, which another machine's rounding may eat up.
            assert np.percentile(gains[1:], 2.5) > (0 if name == "all" else -0.01), (method, name)
