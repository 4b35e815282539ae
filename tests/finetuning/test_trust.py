"""What a finetuning must refuse, or see to before it has cost an hour."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mmcli import InputError
from mmcli.pipeline.core.config import DataConfig, load_config
from mmcli.pipeline.core.progress import Progress
from mmcli.pipeline.core.run import read_info
from mmcli.pipeline.core.run_folders import RunPaths
from mmcli.pipeline.finetuning.distributed import Launch, ProcessGroup, device_here, open_group
from mmcli.pipeline.finetuning.embeddings import refuse_unreadable
from mmcli.pipeline.finetuning.finetune import LiveMonitor
from mmcli.pipeline.finetuning.setup import refuse_seen

WORDS = ("--patches", 64, "--device", "cpu", "--set", "fusion.mlp_dims=[64, 32]", "--set", "knn.K=5", "--workers", 0)


def ids_of(run: Path) -> dict[str, np.ndarray]:
    return {split: load_file(RunPaths(run).codes(split))["image_id"] for split in ("train", "val", "test")}


def change_record(run: Path, **changes: str) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | changes))


def test_a_head_is_not_tested_on_its_train_images(mmcli, miniature, here) -> None:
    """A protocol or a manifest that moves train images of the run to test or val is refused, and so without codes."""
    run = next((here / "runs").iterdir())
    words = ("finetune", "--quiet", "--from", run, "--device", "cpu", "--epochs", 1, "--workers", 0, "--out", "runs/no")
    code, out, err = mmcli(*words, "--data", miniature.data, "--protocol", "coco14")
    assert (code, out, err.count("\n"), "trained on" in err) == (2, "", 1, True), err
    moved = shutil.copytree(miniature.data, here / "moved")
    listing = json.loads((moved / "dataset_coco.json").read_text())
    chosen = next(image for image in listing["images"] if image["split"] == "train")
    chosen["split"] = "test"
    (moved / "dataset_coco.json").write_text(json.dumps(listing))
    assert mmcli("prepare", "--data", moved)[0] == 0
    code, _, err = mmcli(*words, "--data", moved)
    assert (code, err.count("\n"), "test images that the run was trained on" in err) == (2, 1, True), err
    RunPaths(run).codes("train").unlink()
    code, _, err = mmcli(*words, "--data", miniature.data, "--protocol", "coco14")
    assert (code, err.count("\n"), "another protocol" in err) == (2, 1, True), err
    assert not (here / "runs" / "no").exists()


def test_what_the_run_itself_began_with_has_seen_images_too(here) -> None:
    run = next((here / "runs").iterdir())
    sha, ids = read_info(run).manifest_sha256, ids_of(run)
    karpathy = DataConfig()
    refuse_seen(run, karpathy, sha, ids)
    refuse_seen(run, karpathy, "another manifest", ids)
    later = shutil.copytree(run, here / "runs" / "later")
    arrays = load_file(RunPaths(later).codes("train"))
    save_file({name: value[1:] for name, value in arrays.items()}, RunPaths(later).codes("train"))
    free = {"val": ids["val"], "test": ids["train"][:1]}
    refuse_seen(later, karpathy, sha, free)
    text = (later / "config.yaml").read_text()
    assert "start: null" in text
    (later / "config.yaml").write_text(text.replace("start: null", f"start: {run}"))
    with pytest.raises(InputError, match="test images that the run was trained on"):
        refuse_seen(later, karpathy, sha, free)
    with pytest.raises(InputError, match="val images"):
        refuse_seen(later, karpathy, sha, {"val": ids["train"][:1], "test": ids["test"]})
    shutil.rmtree(run)
    refuse_seen(later, karpathy, sha, ids)
    with pytest.raises(InputError, match="another manifest"):
        refuse_seen(later, karpathy, "another manifest", ids)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_image_is_met_before_anything_is_trained(mmcli, miniature, tmp_path: Path, split: str) -> None:
    data = shutil.copytree(miniature.data, tmp_path / "data")
    image = next(
        image for image in json.loads((data / "dataset_coco.json").read_text())["images"] if image["split"] == split
    )
    file = data / image["filepath"] / image["filename"]
    file.write_bytes(b"no image")
    words = ("finetune", "--quiet", "--data", data, "--model", miniature.model, *WORDS, "--unfreeze", "last-1")
    code, out, err = mmcli(*words, "--epochs", 1000, "--out", "run")
    assert (code, out, err.count("\n"), file.name in err) == (2, "", 1, True), err
    assert "replace the file" in err
    assert "manifest" not in err
    assert not (tmp_path / "run").exists()


def test_how_many_images_are_like_it_is_said() -> None:
    with pytest.raises(InputError, match=r"replace the file \(2 more like it\)$"):
        refuse_unreadable({3: "cannot read an image; replace the file", 4: "", 5: ""})


def test_a_resumed_run_is_shown_without_being_trained(mmcli, here) -> None:
    run = next((here / "runs").iterdir())
    change_record(run, kind="finetune", status="interrupted")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, err = mmcli("finetune", "--quiet", "--resume", run, "--plan")
    assert (code, out, err.count("\n"), "--plan" in err) == (2, "", 1, True), err
    code, out, err = mmcli("finetune", "--resume", run, "--print-config")
    assert (code, out, err) == (0, (run / "config.yaml").read_text(), "")
    whole = load_config(run / "config.yaml").training.batch_size
    less = ("--batch-size", whole // 2, "--accumulation", 2, "--device", "cuda:7")
    code, out, _ = mmcli("finetune", "--resume", run, "--print-config", "--json", *less)
    shown = json.loads(out)
    assert (code, shown["training"]["batch_size"], shown["hardware"]["device"]) == (0, whole // 2, "cuda:7")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    change_record(run, kind="train-head")
    assert mmcli("finetune", "--resume", run, "--print-config")[:2] == (2, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-size", -16, "--accumulation", -16), "--batch-size"),
        (("--accumulation", 0), "--accumulation"),
        (("--batch-size", 1, "--accumulation", 1), "another batch"),
    ],
)
def test_a_run_resumes_with_values_that_it_may_have(mmcli, here, words, said: str) -> None:
    run = next((here / "runs").iterdir())
    change_record(run, kind="finetune", status="interrupted")
    code, out, err = mmcli("finetune", "--quiet", "--resume", run, *words)
    assert (code, out, err.count("\n"), said in err) == (2, "", 1, True), err


def test_a_run_resumes_where_its_device_is_not(mmcli, miniature, tmp_path: Path) -> None:
    words = ("--data", miniature.data, "--model", miniature.model, *WORDS, "--unfreeze", "none", "--epochs", 1)
    assert mmcli("finetune", *words, "--out", "run")[0] == 0
    run, text = tmp_path / "run", (tmp_path / "run" / "config.yaml").read_text()
    assert "device: cpu" in text
    far = f"device: cuda:{torch.cuda.device_count() + 1}"
    (run / "config.yaml").write_text(text.replace("device: cpu", far))
    change_record(run, status="interrupted")
    (run / "training.safetensors").unlink(missing_ok=True)
    code, _, err = mmcli("finetune", "--quiet", "--resume", run, "--device", far.removeprefix("device: "))
    assert (code, err.count("\n"), "no such device" in err) == (2, 1, True), err
    for more in (("--device", "cpu"), ()):
        code, _, err = mmcli("finetune", "--quiet", "--resume", run, *more)
        assert (code, read_info(run).status) == (0, "finished"), err
        change_record(run, status="interrupted")


def launched(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """The environment that a launcher gives the first of its processes."""
    common = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (common | more).items():
        monkeypatch.setenv(name, value)


def test_a_device_of_one_process_is_each_ones_own_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (device_here("cpu"), device_here("cuda:99")) == ("cpu", "auto")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (device_here("cuda:1"), device_here("cuda:2")) == ("cuda:1", "auto")
    launched(monkeypatch, WORLD_SIZE="2")
    assert device_here("cuda:1") == "cuda"


def test_two_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would refuse it in the middle, with a traceback."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    launched(monkeypatch, WORLD_SIZE="6", LOCAL_WORLD_SIZE="3")
    for device in ("auto", "cuda"):
        with pytest.raises(InputError, match=r"3 processes, 2 GPUs.*--num-processes 2"), open_group(device):
            pass


class Second(ProcessGroup):
    """The second of two processes, as a broadcast finds it: what the first has is 0.25 everywhere."""

    def broadcast(self, tensors) -> None:
        for tensor in tensors:
            tensor.detach().fill_(0.25)


@pytest.mark.parametrize("sides", [{}, {"image": None}])
def test_all_processes_take_the_weights_and_figures_of_the_first(sides) -> None:
    """Else a rounding could let one of them stop, or take another epoch for the best, and the others would wait."""
    trained, looked_at = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)
    local = {"whole": torch.nn.Parameter(torch.ones(2)), "part": torch.ones(2)}
    shards = SimpleNamespace(local=local, is_part=lambda name: name == "part")
    val = SimpleNamespace(v_img=torch.rand(4, 3), v_txt=torch.rand(4, 2, 3), rows=torch.arange(4))
    store = SimpleNamespace(splits={"val": val})
    config = load_config()
    group = Second(torch.device("cpu"), Launch(rank=1, size=2))
    live = SimpleNamespace(store=store, towers=SimpleNamespace(sides=sides), shards=shards, group=group, config=config)
    live.embed = lambda rows, quiet: None

    def inner(head) -> dict[str, float]:
        assert head is looked_at
        assert all((value == 0.25).all() for value in head.parameters())
        return {"val_mAP": 0.9, "dead_bits": 3.0}

    inner.rows, inner.prior = np.arange(4), 0.1
    figures = LiveMonitor(live, trained, inner, Progress())(looked_at)
    assert set(figures.values()) == {0.25}
    assert list(figures)[:2] == ["val_mAP", "dead_bits"]
    assert len(figures) == (4 if sides else 2)
    assert all(
        (value.detach().double() == (0.25 if value.is_floating_point() else 0)).all()
        for value in trained.state_dict().values()
    )
    assert (local["whole"].tolist(), local["part"].tolist()) == ([0.25, 0.25], [1.0, 1.0])


# A process whose val mAP falls where the first one's rises; with the patience of one epoch it would stop by itself.
UNLIKE = """
import os
from mmcli.pipeline.training import loop, monitor
from mmcli.pipeline.core.run_folders import RunPaths
loop.PATIENT_STEPS, rank, calls = 0, int(os.environ["RANK"]), []
def look(self, head):
    calls.append(head)
    return {"val_mAP": 0.5 + (-0.01 if rank else 0.01) * len(calls)}
monitor.Monitor.__call__ = look
from mmcli.cli import main
main()
"""


@pytest.mark.slow
def test_two_processes_stop_together(miniature, tmp_path: Path) -> None:
    words = ["finetune", "--data", miniature.data, "--model", miniature.model, *WORDS, "--epochs", 4, "--patience", 1]
    words = [sys.executable, "-c", UNLIKE, *words, "--unfreeze", "last-1", "--out", "run"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    team = [
        subprocess.Popen(
            [*map(str, words)],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(100) for process in team] == [0, 0]
    finally:
        for process in team:
            process.kill()
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 4


def test_lists_are_compared_by_what_they_said(tmp_path: Path, monkeypatch) -> None:
    """Where the codes of a run are gone, lists that were edited since are other lists."""
    from types import SimpleNamespace

    from mmcli.pipeline.core.config import load_config
    from mmcli.pipeline.data.protocols import lists_digest
    from mmcli.pipeline.finetuning import setup as finetune_start

    (tmp_path / "test.txt").write_text("a.jpg 1\n")
    config = load_config(options={"data.split_type": "hashnet", "data.protocol_lists": str(tmp_path)})
    info = SimpleNamespace(lists_digest=lists_digest(config.data), manifest_sha256="0" * 64)
    monkeypatch.setattr(finetune_start, "read_info", lambda _: info)
    monkeypatch.setattr(finetune_start, "load_config", lambda _: config)
    finetune_start._refuse_other_data(tmp_path, config.data, "0" * 64)
    (tmp_path / "test.txt").write_text("b.jpg 1\n")
    with pytest.raises(InputError, match="another protocol"):
        finetune_start._refuse_other_data(tmp_path, config.data, "0" * 64)
