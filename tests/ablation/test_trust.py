"""What an ablation must not do: take one run, data set or list for another, lose what is kept, or leave units undone."""

import json
import shutil
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from mmcli import InputError
from mmcli.cache import Store
from mmcli.pipeline.ablation import engines as ablate_engines
from mmcli.pipeline.ablation import worker as ablate_work
from mmcli.pipeline.ablation.experiments import read_experiments
from mmcli.pipeline.ablation.identity import training_identity, training_key
from mmcli.pipeline.ablation.records import read_rows
from mmcli.pipeline.ablation.request import plain_processor
from mmcli.pipeline.ablation.worker import Unit, Workplace, check_source
from mmcli.pipeline.core.config import DataConfig, ModelConfig, load_config
from mmcli.pipeline.data.manifest import Manifest, read_manifest, write_manifest
from mmcli.pipeline.data.protocols import lists_digest
from mmcli.pipeline.training import train_head

SET = ("--set", "fusion.mlp_dims=[64,32]", "--set", "training.num_epochs=3", "--set", "knn.K=5", "--device", "cpu")


def store_of(here: Path) -> Store:
    (folder,) = (path for path in (here / "data" / "cache").iterdir() if path.is_dir())
    return Store.open(folder)


def test_towers_are_trained_on_the_stores_images_and_checkpoint(here: Path, miniature, tmp_path: Path) -> None:
    store = store_of(here)
    model = ModelConfig(siglip2_variant=str(miniature.model))
    check_source(store, miniature.data, model)
    other = tmp_path / "other"
    other.mkdir()
    listing = read_manifest(miniature.data / "manifest.parquet")
    write_manifest(other / "manifest.parquet", Manifest.from_table(listing.table.slice(1)))
    with pytest.raises(InputError, match="another data set than the store's"):
        check_source(store, other, model)
    shutil.copytree(miniature.model, tmp_path / "model")
    settings = tmp_path / "model" / "config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(InputError, match="another checkpoint than the store's"):
        check_source(store, miniature.data, ModelConfig(siglip2_variant=str(tmp_path / "model")))
    with pytest.raises(InputError, match="another checkpoint than the store's"):
        check_source(store, miniature.data, ModelConfig(siglip2_variant="google/siglip2-base-patch16-naflex"))


def test_lists_are_what_they_said_when_they_were_read(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("a.jpg 1\n")
    config = load_config(options={"data.split_type": "hashnet", "data.protocol_lists": str(tmp_path)})
    before = lists_digest(config.data)
    key = training_key(config, "store", lists=before)
    assert key == training_key(config, "store")
    (tmp_path / "test.txt").write_text("b.jpg 1\n")
    assert lists_digest(config.data) != before
    assert training_key(config, "store") != key
    assert training_key(config, "store", lists=before) == key
    assert training_identity(config)["data.protocol_lists"] == lists_digest(config.data)
    assert lists_digest(DataConfig()) == ""


def test_a_row_of_few_neighbours_is_that_of_a_lone_search(here: Path, mmcli) -> None:
    words = ("ablate", "C1", "--set", "knn.distance_metric=hybrid", "--json", "--seeds", 1)
    import mmcli.heads.knn as knn
    import mmcli.pipeline.evaluation.sweep as plan

    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "HYBRID_CANDIDATES", 8)
        patch.setattr(plan, "HYBRID_CANDIDATES", 8)
        for values, out in (("C1=3", "few"), ("C1=3,30", "many")):
            code, output, err = mmcli(*words, "--set-values", values, "--out", out, *SET)
            assert code == 0, err
            rows.append(json.loads(output)["rows"][0])
    assert rows[0]["key"] == rows[1]["key"]
    assert rows[0]["mAP"] == rows[1]["mAP"]


def test_scores_that_cannot_be_kept_cost_their_own_row(here: Path, mmcli, monkeypatch) -> None:
    keep, calls = ablate_work.write_scores, []

    def full(*words):
        calls.append(words)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return keep(*words)

    monkeypatch.setattr(ablate_work, "write_scores", full)
    words = ("ablate", "C1", "--set-values", "C1=3,4,5", "--out", "out", "--json", *SET)
    code, out, _ = mmcli(*words)
    assert (code, json.loads(out)["failed"]) == (1, 1)
    assert sorted(row["status"] for row in read_rows(Path("out"))) == ["failed", "finished", "finished"]
    code, out, _ = mmcli(*words)
    assert (code, json.loads(out)["evaluated"]) == (0, 1)


def test_a_pool_that_breaks_leaves_no_unit_undone(monkeypatch, tmp_path: Path) -> None:
    class Pool:
        _processes = None
        broken = 0

        def __init__(self, *_, **__) -> None:
            self.given = 0

        def submit(self, _do, unit):
            self.given += 1
            if self.given == 3 and Pool.broken == 0:
                Pool.broken = 1
                raise BrokenProcessPool
            from concurrent.futures import Future

            future: Future = Future()
            future.set_result([])
            return future

        def shutdown(self, **_) -> None:
            pass

    monkeypatch.setattr(ablate_engines, "ProcessPoolExecutor", Pool)
    units = [Unit(training=None, evaluations=()) for _ in range(6)]
    place = Workplace(out=tmp_path, stores={}, data=tmp_path)
    given = ablate_engines.in_processes(ablate_engines.Assignment(place=place, units=units), workers=1)
    done = [unit for unit, record in given if record is None]
    assert [id(unit) for unit in done] == [id(unit) for unit in units]


def test_a_run_that_cannot_be_resumed_is_made_anew(here: Path, mmcli, monkeypatch) -> None:
    words = ("ablate", "A2", "--only", "A2=32", "--out", "out", "--json", *SET)
    whole = train_head.train_head

    def stopped(config, **more):
        whole(config, **more)
        folder = more["out"]
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
        raise RuntimeError("killed")

    monkeypatch.setattr(train_head, "train_head", stopped)
    assert mmcli(*words)[0] == 1
    (folder,) = (here / "out" / "runs").iterdir()
    (folder / "training.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(train_head, "train_head", whole)
    code, out, err = mmcli(*words)
    assert (code, json.loads(out)["failed"]) == (0, 0), err
    assert "is trained anew" in err or not (folder / "training.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A1: {varies: towers, values: [[1]]}", "no such part of the towers"),
        ("A1: {varies: towers, values: [last-0]}", "no such part of the towers"),
        ("A1: {varies: model.siglip2_variant, values: [a, b]}", "a key that no experiment varies"),
        ("A1: {varies: hardware.seed, values: [1, 2]}", "a key that no experiment varies"),
        ("extends: y.yaml", "extend themselves"),
    ],
)
def test_what_no_experiment_can_be_is_refused(tmp_path: Path, monkeypatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(text)
    Path("y.yaml").write_text("extends: x.yaml")
    with pytest.raises(InputError, match=message):
        read_experiments("x.yaml")


def test_towers_are_spelled_as_a_run_spells_them(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("B1: {varies: towers, values: [LAST-1, full, false, true]}")
    assert [choice.towers for choice in read_experiments(str(tmp_path / "x.yaml"))["B1"].choices] == [
        "last-1",
        "all",
        "last-2",
        "frozen",
    ]


def test_the_stores_resizer_is_no_part_of_finetuned_towers() -> None:
    assert plain_processor('{"size": 1, "resizer": "torch"}') == plain_processor('{"size": 1}')
