"""Tagging from Python: the codes and scores of knn-eval again, from pixels and text; and what every tag is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import mmcli
from mmcli import InputError, Tagger
from mmcli.heads.config import KnnConfig
from mmcli.pipeline.core.config import load_config
from mmcli.pipeline.core.results import Codes, read_codes
from mmcli.pipeline.core.run import open_run
from mmcli.pipeline.data.manifest import read_manifest
from mmcli.pipeline.evaluation.knn_eval import knn_eval
from mmcli.pipeline.tagging.encode import Coded
from mmcli.pipeline.tagging.index_file import Origin, TagIndex
from mmcli.pipeline.tagging.tagger import run_store
from mmcli.pipeline.tagging.voting import Query, Voters
from mmcli.pipeline.training.train_head import train_head


def run_of(folder: Path) -> Path:
    return next(path for path in (folder / "runs").iterdir() if (path / "run.json").is_file())


def pairs(miniature, split: str) -> tuple[list[Path], list[str], list[int]]:
    listing = read_manifest(miniature.data / "manifest.parquet")
    rows = listing.rows(split)
    return (
        [miniature.data / listing.paths[r] for r in rows],
        [listing.captions[r][0] for r in rows],
        [int(listing.image_ids[r]) for r in rows],
    )


@pytest.fixture(scope="module")
def tagger(made: Path) -> Tagger:
    return Tagger.load(run_of(made), device="cpu")


def test_the_same_codes_and_scores_as_from_the_store(made, miniature, tagger, tmp_path) -> None:
    run = open_run(shutil.copytree(run_of(made), tmp_path / "run"))  # whose metrics other tests do not see
    stored = read_codes(run.folder, "test")
    images, captions, ids = pairs(miniature, "test")
    assert ids == stored.image_id.tolist()
    coded = tagger.encoder.encode(images, captions)
    np.testing.assert_allclose(coded.soft, stored.soft, atol=2e-4)
    sure = np.abs(stored.soft) > 1e-3  # a soft code at zero may fall to either side
    assert (np.unpackbits(coded.packed, axis=1) == np.unpackbits(stored.packed, axis=1))[sure].all()
    knn_eval(load_config(run.folder / "config.yaml"), run=run)
    wanted = load_file(run.folder / "scores" / "knn-test.safetensors")["scores"]
    found = tagger.predict(images, captions)
    same = (coded.packed == stored.packed).all(1)
    assert same.sum() >= len(same) - 1
    np.testing.assert_allclose(np.stack([one.scores for one in found])[same], wanted[same], atol=1e-6)


def test_a_train_image_with_its_id_does_not_vote_for_itself(miniature, tagger) -> None:
    images, captions, ids = pairs(miniature, "train")
    (alone,) = tagger.predict(images[:1], captions[:1])
    assert alone.neighbours[0].distance <= 1
    assert ids[0] in [one.image_id for one in alone.neighbours]
    (without,) = tagger.predict(images[:1], captions[:1], image_ids=ids[:1])
    assert ids[0] not in [one.image_id for one in without.neighbours]
    assert len(without.neighbours) == len(alone.neighbours) == 5


def test_every_tag_has_its_voters(miniature, tagger) -> None:
    images, captions, _ = pairs(miniature, "test")
    train_paths, train_captions, train_ids = pairs(miniature, "train")
    listing = read_manifest(miniature.data / "manifest.parquet")
    labels = {
        int(i): set(np.flatnonzero(row)) for i, row in zip(listing.image_ids, listing.labels_matrix(), strict=True)
    }
    for image, caption, one in zip(images, captions, tagger.predict(images, captions, k=7, top=3), strict=True):
        assert (one.image, one.caption) == (str(image), caption)
        assert len(one.neighbours) == 7
        assert 1 <= len(one.tags) <= 3
        assert [tag.score for tag in one.tags] == sorted((tag.score for tag in one.tags), reverse=True)
        best = np.argsort(-one.scores, kind="stable")[: len(one.tags)]
        assert [tag.name for tag in one.tags] == [tagger.category_names[c] for c in best]
        assert sum(n.weight for n in one.neighbours) == pytest.approx(1)
        for tag in one.tags:
            assert tag.score == pytest.approx(sum(n.weight for n in tag.voters), abs=1e-6)
            for near in tag.voters:
                at = train_ids.index(near.image_id)
                assert miniature.data / near.path == train_paths[at]
                assert near.caption == train_captions[at]
                assert near.similarity == pytest.approx(1 - near.distance / 64, abs=1e-6)
                assert {tagger.category_names.index(name) for name in near.labels} == labels[near.image_id]
                assert tag.name in near.labels
    assert tagger.notes == ()


def test_paths_arrays_and_pillow_images_are_the_same_picture(miniature, tagger) -> None:
    images, captions, _ = pairs(miniature, "test")
    opened = Image.open(images[0])
    given = [images[0], str(images[0]), opened, np.asarray(opened)]
    first, *others = tagger.encoder.encode(given, captions[:1] * 4).soft
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-6)
    assert [one.image for one in tagger.predict(given, captions[:1] * 4)] == [str(images[0])] * 2 + [None] * 2
    grey = np.asarray(opened.convert("L"))
    assert len(tagger.predict([grey, np.dstack([grey] * 4)], captions[:2])) == 2


def test_batches_change_nothing(miniature, tagger, monkeypatch) -> None:
    images, captions, _ = pairs(miniature, "test")
    together = tagger.predict(images, captions)
    monkeypatch.setattr("mmcli.pipeline.tagging.encode.BATCH", 3)
    for one, other in zip(together, tagger.predict(images, captions), strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    assert tagger.predict([], []) == []


@pytest.mark.parametrize(
    ("images", "captions", "more", "line"),
    [
        (["a.jpg"], ["x"], {}, "cannot read an image: a.jpg"),
        ([np.zeros((4, 4), np.float32)], ["x"], {}, "not an image: got an array (4, 4) of float32"),
        ([np.zeros((0, 4, 3), np.uint8)], ["x"], {}, "not an image"),
        ([3], ["x"], {}, "not an image: got int"),
        (["a.jpg"], [None], {}, "no caption: a.jpg"),
        (["a.jpg"], ["  "], {}, "no caption"),
        (["a.jpg"], None, {}, "no caption"),
        (["a.jpg"], ["x", "y"], {}, "1 images, 2 captions"),
        ("a.jpg", "x", {}, "lists"),
        ([np.zeros((9, 9, 3), np.uint8)], ["x"], {"k": 1000}, "got --k 1000, wanted 1 to 40"),
        ([np.zeros((9, 9, 3), np.uint8)], ["x"], {"k": 0}, "got --k 0"),
        ([np.zeros((9, 9, 3), np.uint8)], ["x"], {"image_ids": [1, 2]}, "2 ids"),
    ],
)
def test_what_is_refused(tagger, tmp_path, monkeypatch, images, captions, more, line) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        tagger.predict(images, captions, **more)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_store_ids_are_shown_and_that_is_said(here, miniature, monkeypatch) -> None:
    run = run_of(here)
    (store,) = (here / "data" / "cache").iterdir()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"store": str(store.relative_to(here))}))
    monkeypatch.chdir("/")
    assert Tagger.load(run, device="cpu").notes == ()  # a relative store is found from its run's place
    store.rename(store.with_name("elsewhere"))
    tagger = Tagger.load(run, device="cpu")
    assert len(tagger.notes) == 1
    assert "shown by their ids" in tagger.notes[0]
    images, captions, _ = pairs(miniature, "test")
    (one,) = tagger.predict(images[:1], captions[:1])
    assert {near.path for near in one.neighbours} == {near.caption for near in one.neighbours} == {None}
    assert all(near.image_id in read_codes(run, "train").image_id for near in one.neighbours)
    store.with_name("elsewhere").rename(store)
    opened = open_run(run)
    assert run_store(opened) is not None
    assert run_store(replace(opened, info=replace(opened.info, store_digest="0" * 64))) is None  # another one is there
    (run / "run.json").write_text(json.dumps(record | {"store": str(store), "store_digest": "0" * 64}))
    with pytest.raises(InputError, match="another checkpoint"):  # neither the store nor the checkpoint are the run's
        Tagger.load(run, device="cpu")


def test_another_checkpoint_than_the_runs_is_refused(here, miniature, tmp_path) -> None:
    run = run_of(here)
    moved = tmp_path / "elsewhere" / "towers"
    shutil.copytree(miniature.model, moved)
    assert Tagger.load(run, model=str(moved), device="cpu").notes == ()  # the same files in another place
    config = moved / "preprocessor_config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(InputError, match="another checkpoint than the run's"):
        Tagger.load(run, model=str(moved), device="cpu")


@pytest.mark.parametrize("metric", ["cosine", "hybrid", "hamming", "asymmetric"])
@pytest.mark.parametrize("strategy", ["threshold", "rank", "uniform"])
def test_every_metric_and_vote(made, miniature, tagger, metric, strategy) -> None:
    knn = KnnConfig(K=4, distance_metric=metric, voting_strategy=strategy, theta=0.99)
    other = Voters(tagger.voters.index, knn)
    coded = tagger.encoder.encode(*(part[:2] for part in pairs(miniature, "test")[:2]))
    for one in other.tag(coded, [Query(None, None)] * 2):
        assert one.metric == metric
        assert one.unit == ("bits" if metric == "hamming" else "cosine distance")
        for tag in one.tags:
            assert tag.score == pytest.approx(sum(n.weight for n in tag.voters), abs=1e-6)
            assert all(n.weight > 0 for n in tag.voters)


@pytest.mark.parametrize("strategy", ["softmax", "rank"])
def test_shared_ties_do_not_depend_on_the_order_of_the_index(strategy) -> None:
    rng = np.random.default_rng(0)
    n, C = 40, 5
    packed, labels = rng.integers(0, 4, (n, 1), np.uint8), rng.integers(0, 2, (n, C)).astype(np.uint8)
    origin = Origin(head="h", store="s", model="m", patches=1)
    coded = Coded(soft=np.zeros((3, 8), np.float32), packed=packed[:3])
    queries = [Query(None, None, 0), Query(None, None), Query(None, None, 2)]
    found = []
    for order in (np.arange(n), rng.permutation(n)):
        codes = Codes(
            image_id=order, soft=np.zeros((n, 8), np.float32), packed=packed[order], labels=labels[order], logits=None
        )
        index = TagIndex.from_codes(codes, tuple("abcde"), origin)
        voters = Voters(index, KnnConfig(K=7, voting_strategy=strategy, ties="average"))
        found.append(voters.tag(coded, queries))
        plain = Voters(index, KnnConfig(K=7, voting_strategy=strategy)).tag(coded, queries)
        assert any((a.scores != b.scores).any() for a, b in zip(found[-1], plain, strict=True))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)
        assert sum(near.weight for near in one.neighbours) <= 1 + 1e-9
        assert sorted(near.weight for near in one.neighbours) == sorted(near.weight for near in other.neighbours)
    with pytest.raises(InputError, match="only Hamming distances tie"):
        Voters(index, KnnConfig(K=7, distance_metric="cosine", ties="average"))


def test_a_neighbour_without_weight_is_no_voter() -> None:
    soft = np.array([[1, 0], [1, 0.1], [-1, 1]], np.float32)
    origin = Origin(head="h", store="s", model="m", patches=1)
    codes = Codes(image_id=np.arange(3), soft=soft, packed=None, labels=np.ones((3, 1), np.uint8), logits=None)
    knn = KnnConfig(K=3, distance_metric="cosine", voting_strategy="threshold", theta=0.9)
    voters = Voters(TagIndex.from_codes(codes, ["x"], origin), knn)
    (one, own) = voters.tag(Coded(soft[[0, 0]], None), [Query("q", None), Query(None, None)])
    assert [near.image_id for near in one.neighbours] == [0, 1, 2]
    assert [near.image_id for near in one.tags[0].voters] == [0, 1]
    assert [near.weight for near in own.neighbours] == [0.5, 0.5, 0]
    (one, own) = voters.tag(Coded(soft[[0, 0]], None), [Query("q", None, 0), Query("q", None)], k=2)
    assert [near.image_id for near in one.neighbours] == [1, 2]  # not itself; an id that was not given is not 0
    assert [near.image_id for near in own.neighbours] == [0, 1]


def test_heads_without_bits_and_of_images_alone(made, miniature, tmp_path) -> None:
    options = {
        "hash.bits": 0,
        "fusion.inputs": "image",
        "fusion.mlp_dims": [32, 16],
        "training.num_epochs": 1,
        "knn.K": 3,
        "hardware.device": "cpu",
    }
    from mmcli.pipeline.core.config import resolve

    store = next((made / "data" / "cache").iterdir())
    run = train_head(resolve(load_config(options=options)), store=store, out=tmp_path / "run").run
    tagger = Tagger.load(run.folder, device="cpu")
    images, _, _ = pairs(miniature, "test")
    found = tagger.predict(images)
    assert found[0].metric == "cosine"
    stored = read_codes(run.folder, "test")
    np.testing.assert_allclose(tagger.encoder.encode(images, [None] * len(images)).soft, stored.soft, atol=1e-3)
    with pytest.raises(InputError, match="no hash layer"):
        Tagger.load(run.folder, device="cpu", knn=KnnConfig(distance_metric="hamming"))


def test_the_package_gives_it_without_loading_torch_before(repo) -> None:
    import subprocess
    import sys

    code = "import sys, mmcli; assert 'torch' not in sys.modules; from mmcli import Tagger; assert Tagger.load"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="nonsense"):
        mmcli.nonsense  # noqa: B018
