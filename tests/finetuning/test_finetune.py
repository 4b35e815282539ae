"""``mmcli finetune`` against train-head from a store, against plain transformers, and as a command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mmcli import InputError, Tagger, load_head
from mmcli.cache import Store
from mmcli.pipeline.core.config import Config, FinetuneConfig, OptimizerConfig, load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.core.results import read_codes
from mmcli.pipeline.core.run import read_info
from mmcli.pipeline.extraction.encoder import Encoder
from mmcli.pipeline.extraction.extract import ExtractPlan, extract
from mmcli.pipeline.extraction.images import Grid
from mmcli.pipeline.finetuning.finetune import finetune
from mmcli.pipeline.finetuning.towers import Towers
from mmcli.pipeline.training.train_head import train_head

CPU = torch.device("cpu")
WORDS = (
    "--epochs",
    2,
    "--patches",
    64,
    "--device",
    "cpu",
    "--set",
    "fusion.mlp_dims=[64, 32]",
    "--set",
    "knn.K=5",
    "--batch-size",
    16,
    "--workers",
    0,
    "--lr-towers",
    1e-3,
)


def configure(model: Path, **more: object) -> Config:
    options = {
        "model.siglip2_variant": str(model),
        "model.max_num_patches": 64,
        "hardware.device": "cpu",
        "knn.K": 5,
        "fusion.mlp_dims": [64, 32],
        "training.num_epochs": 2,
        "training.batch_size": 16,
        "data.num_workers": 0,
        "optimizer.lr_towers": 1e-3,
        "training.mixed_precision": False,
    }
    return load_config(options=options | more)


def parts_of(model: Path):
    return Encoder.parts(str(model), patches=64, device=CPU)


def told(records) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name[-2:] != "_s"} for record in records]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "towers" / "model.safetensors")


def best_head(folder: Path) -> dict[str, np.ndarray]:
    first = json.loads((folder / "checkpoints" / "checkpoints.json").read_text())[0]
    return load_file(folder / "checkpoints" / first["file"])


@pytest.mark.parametrize("options", [{}, {"preset": "plan", "fusion.magnitude": "shuffled"}])
def test_frozen_towers_give_what_train_head_gives_from_the_store(miniature, tmp_path: Path, options) -> None:
    """The proof that a float32 store is faithful: every term of every epoch, and the codes."""
    config = configure(miniature.model, **options)
    extract(config, ExtractPlan(data=miniature.data, out=tmp_path / "store", dtype="float32"))
    small = config.model_copy(update={"model": type(config.model)()})
    stored = train_head(small, store=tmp_path / "store", out=tmp_path / "stored")
    live = finetune(config, data=miniature.data, unfreeze="none", out=tmp_path / "live")
    assert len(live.fit.history) == 2
    for mine, theirs in zip(told(live.fit.history), told(stored.fit.history), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert live.metrics["mAP"] == pytest.approx(stored.metrics["mAP"], abs=1e-6)
    for split in ("train", "val", "test"):
        codes = [read_codes(tmp_path / name, split) for name in ("stored", "live")]
        assert np.array_equal(codes[0].image_id, codes[1].image_id)
        np.testing.assert_allclose(codes[0].soft, codes[1].soft, atol=1e-4)
    assert not (tmp_path / "live" / "towers").exists()


@pytest.mark.parametrize("augment", [False, True])
def test_towers_that_take_part_untrained_change_nothing(miniature, tmp_path: Path, augment: bool) -> None:
    """With a rate of nearly zero the steps through the towers are those of frozen ones; other views are other images."""
    still = {"optimizer.lr_towers": 1e-30, "scheduler.min_lr": 0.0, "training.gradient_clip_norm": None}
    config = configure(miniature.model, **still)
    frozen = finetune(config, data=miniature.data, unfreeze="none", out=tmp_path / "frozen")
    section = config.finetune.model_copy(update={"augment": augment})
    config = config.model_copy(update={"finetune": section})
    live = finetune(config, data=miniature.data, unfreeze="last-1", out=tmp_path / "live")
    views = told(frozen.fit.history), told(live.fit.history)
    for mine, theirs in zip(*views, strict=True):
        assert mine["grad_norm"] < theirs["grad_norm"]  # that of the towers counts
        same = {name: value for name, value in theirs.items() if name in mine and name != "grad_norm"}
        assert (mine | same == pytest.approx(mine, rel=1e-4, abs=1e-5)) is (not augment)


def test_what_is_trained_by_name(miniature) -> None:
    def names(**section: object) -> set[str]:
        parts = parts_of(miniature.model)
        trained = Towers(parts, FinetuneConfig(**section)).trained
        assert set(trained) == {name for name, value in parts.model.named_parameters() if value.requires_grad}
        return set(trained)

    every = dict(parts_of(miniature.model).model.named_parameters())
    assert names(unfreeze="none") == set()
    assert names(unfreeze="all") == {name for name in every if not name.startswith("logit_")}
    last = names(unfreeze="last-1")
    wanted = (
        "vision_model.encoder.layers.1.",
        "vision_model.post_layernorm.",
        "vision_model.head.",
        "text_model.encoder.layers.1.",
        "text_model.final_layer_norm.",
        "text_model.head.",
    )
    assert last == {name for name in every if name.startswith(wanted)}
    assert names(unfreeze="last-1", towers="image") == {name for name in last if name.startswith("vision_model.")}
    assert names(unfreeze="last-1", towers="text") == {name for name in last if name.startswith("text_model.")}
    assert names(unfreeze="last-2") > last
    assert not {name for name in names(unfreeze="last-2") if "embeddings" in name}
    with pytest.raises(InputError, match="at most last-2"):
        names(unfreeze="last-3")


def test_rates_fall_with_depth_and_norms_do_not_decay(miniature) -> None:
    towers = Towers(parts_of(miniature.model), FinetuneConfig(unfreeze="all", layer_decay=0.5))
    name_of = {id(parameter): name for name, parameter in towers.trained.items()}
    seen = set()
    for group in towers.groups(OptimizerConfig(lr_towers=1e-4, weight_decay=0.1)):
        for parameter in group["params"]:
            name = name_of[id(parameter)]
            seen.add(name)
            below = 3 if ".embeddings." in name else 2 if ".layers.0." in name else 1 if ".layers.1." in name else 0
            assert group["lr"] == pytest.approx(1e-4 * 0.5**below), name
            plain = name.endswith("bias") or "norm" in name
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
    assert seen == set(towers.trained)


@pytest.mark.parametrize("unfreeze", ["last-1", "last-2", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_embeddings_and_gradients_are_those_of_transformers(miniature, unfreeze: str, checkpointing: bool) -> None:
    rng = np.random.default_rng(0)
    grids, counts = (Grid(6, 10), Grid(8, 8), Grid(5, 3)), (2, 1, 1)
    pieces = [rng.integers(0, 255, (n, grid.tokens, 768), np.uint8) for n, grid in zip(counts, grids, strict=True)]
    section = FinetuneConfig(unfreeze=unfreeze, gradient_checkpointing=checkpointing)
    towers = Towers(parts_of(miniature.model), section)
    ids = Encoder(towers.parts).tokenize(["a dog", "Two cats on a sofa", "x", "a bus"])
    pack = [(torch.from_numpy(patches), grid) for patches, grid in zip(pieces, grids, strict=True)]
    ours = towers.sides["image"].encode_pack(pack), towers.sides["text"](ids)
    plain = parts_of(miniature.model).model
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in towers.trained)
    each = [torch.from_numpy(image).float() * towers.parts.scale.factor for patches in pieces for image in patches]
    padded = torch.stack([torch.nn.functional.pad((image - 0.5) / 0.5, (0, 0, 0, 64 - len(image))) for image in each])
    mask = torch.tensor([[1] * len(image) + [0] * (64 - len(image)) for image in each])
    theirs = (
        plain.get_image_features(
            pixel_values=padded,
            pixel_attention_mask=mask,
            spatial_shapes=torch.tensor([[6, 10], [6, 10], [8, 8], [5, 3]]),
        ).pooler_output,
        plain.get_text_features(input_ids=ids).pooler_output,
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    for pair in (ours, theirs):
        torch.cosine_similarity(*pair).sum().backward()
    reference = dict(plain.named_parameters())
    for name, parameter in towers.trained.items():
        slope = reference[name].grad
        assert slope.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, slope, atol=1e-5 + 1e-3 * float(slope.abs().max()), rtol=1e-3)
    assert all(
        value.grad is None for name, value in towers.parts.model.named_parameters() if name not in towers.trained
    )


@pytest.mark.parametrize("towers", ["both", "image", "text"])
def test_the_cosine_term_alone_trains_the_towers(miniature, tmp_path: Path, towers) -> None:
    """Nothing else weighs anything; what was no gradient with frozen towers brings image and caption together."""
    only = {
        "loss.cosine_weight": 1.0,
        "loss.bce_weight": 0.0,
        "loss.hash_weight": 0.0,
        "loss.fused_weight": 0.0,
        "loss.nested_weight": 0.0,
    }
    config = configure(miniature.model, **only, **{"training.num_epochs": 6, "scheduler.warmup_epochs": 0})
    live = finetune(config, data=miniature.data, unfreeze="last-1", towers=towers, out=tmp_path / "live")
    cosines = [record["cosine"] for record in live.fit.history]
    assert cosines[-1] < 0.9 * cosines[0]
    before, after = (
        load_file(path)
        for path in (miniature.model / "model.safetensors", tmp_path / "live" / "towers" / "model.safetensors")
    )
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved
    assert moved <= set(json.loads((tmp_path / "live" / "finetune.json").read_text())["trained"])
    prefixes = {"both": {"vision_model", "text_model"}, "image": {"vision_model"}, "text": {"text_model"}}
    assert {name.partition(".")[0] for name in moved} == prefixes[towers]


def test_parts_of_a_batch_are_the_batch(miniature, tmp_path: Path) -> None:
    """Batch norm, mixtures and hash terms look at all 16 images, whether 16, 4 or 1 of them are in memory."""
    runs = {}
    for size, parts in ((16, 1), (4, 4), (1, 16)):
        batch = {"training.batch_size": size, "training.accumulation_steps": parts, "preset": "recommended"}
        # Of one epoch, which is the best: of several, rounding could choose.
        config = configure(miniature.model, **batch, **{"training.num_epochs": 1})
        runs[size] = finetune(config, data=miniature.data, unfreeze="last-2", out=tmp_path / str(size))
    for size in (4, 1):
        for mine, theirs in zip(told(runs[size].fit.history), told(runs[16].fit.history), strict=True):
            # Rounding may turn a bit, which shows in what is made of bits.
            for name in mine.keys() - {"val_mAP", "bit_balance", "dead_bits"}:
                assert mine[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-4), name
        for split in ("val", "test"):
            soft = [read_codes(tmp_path / str(name), split).soft for name in (size, 16)]
            np.testing.assert_allclose(*soft, atol=5e-3)


def test_the_run_is_one_like_any_other(mmcli, miniature, tmp_path: Path) -> None:
    """Neighbours, tags, index and comparison work on it; its towers fill a store of another key with its codes' numbers."""
    words = ("--data", miniature.data, "--model", miniature.model, *WORDS)
    code, out, err = mmcli("finetune", "--unfreeze", "last-1", *words, "--out", "runs/tuned", "--json")
    assert code == 0, err
    assert json.loads(out)["run"] == "runs/tuned"
    assert "vision_model.encoder.layers.1: " in err
    assert "vision_model.encoder.layers.0: " not in err
    assert mmcli("finetune", "--unfreeze", "none", *words, "--out", "runs/frozen")[0] == 0
    code, out, err = mmcli("knn-eval", "--json")
    assert (code, json.loads(out)["run"]) == (0, "runs/frozen"), err
    code, out, err = mmcli("knn-eval", "--run", "runs/tuned", "--json")
    assert code == 0, err
    assert mmcli("compare", "runs/tuned", "runs/frozen")[0] == 0
    encoders = [load_head(tmp_path / "runs" / name / "model").about["encoder"] for name in ("tuned", "frozen")]
    assert encoders == ["model, finetuned with this head", "model"]
    assert mmcli("index", "build", "--run", "runs/tuned")[0] == 0
    assert "captions and paths are not known" not in mmcli("index", "build", "--run", "runs/frozen")[1]

    listing = json.loads((miniature.data / "dataset_coco.json").read_text())["images"]
    test = [image for image in listing if image["split"] == "test"]
    files = [miniature.data / image["filepath"] / image["filename"] for image in test]
    tagger = Tagger.load(tmp_path / "runs" / "tuned", device="cpu")
    coded = tagger.encoder.encode(files, [image["sentences"][0]["raw"] for image in test])
    codes = read_codes(tmp_path / "runs" / "tuned", "test")
    by_id = {int(image_id): row for row, image_id in enumerate(codes.image_id)}
    order = [by_id[image["cocoid"]] for image in test]
    np.testing.assert_allclose(coded.soft, codes.soft[order], atol=1e-5)
    assert not np.allclose(coded.soft, read_codes(tmp_path / "runs" / "frozen", "test").soft[order], atol=1e-3)

    for name, model in (("own", tmp_path / "runs" / "tuned" / "towers"), ("base", miniature.model)):
        store = ("--data", miniature.data, "--patches", 64, "--dtype", "float32", "--device", "cpu", "--out", name)
        assert mmcli("extract", "--model", model, *store)[0] == 0
    own, base = Store.open(tmp_path / "own"), Store.open(tmp_path / "base")
    assert own.key.digest != base.key.digest
    assert read_info(tmp_path / "runs" / "frozen").store_digest == base.key.digest
    arrays = own.load()
    rows = [own.ids.tolist().index(image["cocoid"]) for image in test]
    again = tagger.encoder.code(arrays.v_img[rows], arrays.v_txt[rows, 0])
    np.testing.assert_allclose(again.soft, codes.soft[order], atol=1e-5)

    weights = tmp_path / "runs" / "tuned" / "towers" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    data_words = words[:2]
    for call in (("predict", files[0], "--caption", "a dog"), ("finetune", "--from", "runs/tuned", *data_words)):
        run = ("--run", "runs/tuned") if call[0] == "predict" else ()
        code, _, err = mmcli(*call, *run, "-q", "--device", "cpu")
        assert (code, err.count("\n")) == (2, 1), err
        assert ("damaged towers" if run else "another checkpoint than the run's") in err


def test_it_begins_with_the_head_of_a_run(mmcli, miniature, here) -> None:
    """``--from``: the head as it was, and its towers; with a rate of nothing both stay."""
    head = next((here / "runs").iterdir())
    words = ("--data", miniature.data, "--epochs", 1, "--device", "cpu", "--workers", 0, "--batch-size", 16)
    still = [f"optimizer.{name}=1e-30" for name in ("lr_fusion", "lr_hash", "lr_classifier", "weight_decay")]
    sets = [word for one in (*still, "scheduler.min_lr=0") for word in ("--set", one)]
    code, _, err = mmcli("finetune", "--from", head, *words, *sets, "--lr-towers", 1e-3, "--out", "runs/warm")
    assert code == 0, err
    before, after = best_head(head), best_head(here / "runs" / "warm")
    for name in before:
        if "running" not in name and "num_batches" not in name:
            np.testing.assert_allclose(after[name], before[name], atol=1e-6, err_msg=name)
    code, _, err = mmcli("finetune", "--from", "runs/warm", *words, *sets, "--lr-towers", 1e-30, "--out", "runs/again")
    assert code == 0, err
    first, second = tensors(here / "runs" / "warm"), tensors(here / "runs" / "again")
    for name in first:
        np.testing.assert_allclose(second[name], first[name], atol=1e-6, err_msg=name)
    for more, said in [(("--bits", 32), "another head"), (("--patches", 32), "--patches"), (("--model", "x"), "x")]:
        code, _, err = mmcli("finetune", "--quiet", "--from", head, *words, *more, "--out", "runs/no")
        assert (code, err.count("\n"), said in err) == (2, 1, True), err


def test_mistakes_are_one_line(mmcli, miniature, here) -> None:
    words = ("--data", miniature.data, "--model", miniature.model, *WORDS)
    run = next((here / "runs").iterdir())
    for more, said in [
        (("--unfreeze", "last-0"), "last-N"),
        (("--unfreeze", "last-9"), "at most last-2"),
        (("--unfreeze", "some"), "last-N"),
        (("--towers", "image", "--inputs", "text"), "--towers"),
        (("--set", "training.ema_decay=0.9"), "ema_decay"),
        (("--set", "fusion.magnitude=shuffled"), "magnitude"),
        (("--data", "nowhere"), "nowhere"),
        (("--layer-decay", 2), "--layer-decay"),
        (("--from", "runs/absent"), "no run"),
        (("--resume", run), "beside it"),
        (("--set", "classifier.num_classes=3"), "num_classes"),
    ]:
        code, out, err = mmcli("finetune", "--quiet", *words, *more, "--out", "runs/no")
        assert (code, out, err.count("\n")) == (2, "", 1), (more, err)
        assert said in err, err
    code, _, err = mmcli("finetune", "--quiet", "--resume", run)
    assert (code, "a run of train-head" in err) == (2, True)
    code, _, err = mmcli("train-head", "--quiet", "--set", "model.freeze_towers=false", "--out", "runs/no")
    assert (code, "mmcli finetune" in err) == (2, True)
    assert not (here / "runs" / "no").exists()


def test_it_says_when_the_cosine_term_draws_everything_together(miniature, tmp_path: Path) -> None:
    lines = []

    class Told(Progress):
        def say(self, line: str) -> None:
            lines.append(line)

    for alpha, epochs in ((100.0, 12), (0.0, 2)):
        config = configure(miniature.model, **{"training.num_epochs": epochs, "scheduler.warmup_epochs": 0})
        lines.clear()
        weighed = config.model_copy(update={"loss": config.loss.model_copy(update={"cosine_weight": alpha})})
        live = finetune(weighed, data=miniature.data, out=tmp_path / str(alpha), progress=Told())
        said = [line for line in lines if "--alpha" in line and line.startswith("warning")]
        assert len(said) == (1 if alpha else 0), lines
        assert {"alike_img", "alike_txt"} <= live.fit.history[0].keys()


@pytest.mark.slow
@pytest.mark.realdata
def test_it_runs_through_on_real_images(mmcli, realdata: Path, miniature, tmp_path: Path) -> None:
    """428 photographs with their captions, towers of the miniature: every size of image, and a mAP above that of luck."""
    data = tmp_path / "coco"
    data.mkdir()
    for part in ("train2014", "val2014", "annotations", "dataset_coco.json"):
        (data / part).symlink_to(realdata / "coco_slice" / part)
    assert mmcli("prepare", "--data", data)[0] == 0
    words = (
        "--data",
        data,
        "--model",
        miniature.model,
        *WORDS,
        "--preset",
        "small",
        "--unfreeze",
        "last-1",
        "--alpha",
        0,
    )
    code, out, err = mmcli("finetune", *words, "--augment", "--out", "runs/real", "--json")
    assert code == 0, err
    assert json.loads(out)["mAP"] > 0
    assert mmcli("knn-eval", "--run", "runs/real")[0] == 0
    codes = read_codes(tmp_path / "runs" / "real", "train")
    assert len(codes) == 337
