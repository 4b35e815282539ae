"""Heads to and from folders in the hub's form: equal when read back, one line when damaged, never a pickle."""

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from mmcli import InputError, load_head
from mmcli.heads.config import ClassifierConfig, FusionConfig, HashConfig
from mmcli.heads.decompose import log_norms
from mmcli.heads.model import BaseHead, Head, MlpBaseline, make_head

D, C = 12, 3
ABOUT = {
    "preset": "plan",
    "encoder": "google/some-encoder",
    "category_names": ["ant", "bee", "cow"],
    "metrics": {"mAP": 0.51234, "P@5": 0.2, "method": "classifier", "split": "test"},
}


def pair(n: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) * 3, torch.randn(n, D, generator=generator)


def make(kind: str = "fusion", *, bits: int = 16, **fusion) -> BaseHead:
    torch.manual_seed(0)
    sections = FusionConfig(mlp_dims=(8, 6), **fusion), HashConfig(bits=bits), ClassifierConfig(num_classes=C)
    head = make_head(kind, *sections, width=D)
    head.fit_log_norms(log_norms(*pair(100, seed=1)))
    head.train()
    head(*pair(seed=2))  # moves running statistics
    return head.eval()


KINDS = [
    {"kind": "fusion"},
    {"kind": "fusion", "bits": 0},
    {"kind": "fusion", "adapter": "linear", "inputs": "image"},
    {"kind": "fusion", "type": "concat", "block_norm": "none"},
    {"kind": "mlp", "bits": 0},
    {"kind": "mlp", "bits": 0, "inputs": "text"},
]


def same(one: BaseHead, other: BaseHead) -> bool:
    state, again = one.state_dict(), other.state_dict()
    first, second = one(*pair()), other(*pair())
    return (
        state.keys() == again.keys()
        and all(torch.equal(state[name], again[name]) for name in state)
        and torch.equal(first.logits, second.logits)
        and torch.equal(first.features, second.features)
    )


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_what_was_saved_reads_back_to_the_bit(options: dict, tmp_path: Path, capsys) -> None:
    head = make(**options)
    head.save_pretrained(tmp_path / "model", config=ABOUT)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for again in (type(head).from_pretrained(tmp_path / "model"), load_head(tmp_path / "model")):
        assert type(again) is type(head)
        assert same(head, again)
        assert not again.training
        assert (again.build, again.about) == (head.build, ABOUT)
        assert all(parameter.requires_grad for parameter in again.parameters())
    assert capsys.readouterr().out == ""
    # Saved again, it says what it said.
    again.save_pretrained(tmp_path / "second")
    for name in ("config.json", "README.md", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_loaded_head_does_not_hang_on_its_file(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    head = load_head(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert same(head, make())


def test_a_copy_is_a_head_of_its_own() -> None:
    head = make()
    other = copy.deepcopy(head)
    assert same(head, other)
    torch.nn.init.zeros_(other.classifier.weight)
    assert not same(head, other)
    assert other.build == head.build


def test_loading_draws_nothing(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    torch.manual_seed(7)
    load_head(tmp_path)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_card_says_what_the_head_is(options: dict, tmp_path: Path) -> None:
    head = make(**options)
    head.save_pretrained(tmp_path, config=ABOUT)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "mmcli"
    assert card.data.base_model == "google/some-encoder"
    text = card.text
    bits = options.get("bits", 16)
    for part in (
        f"| bits | {bits or 'none: no hash layer'} |",
        "| preset | plan |",
        "ant, bee, cow",
        "0.5123",
        "## Limits",
    ):
        assert part in text
    assert f"{sum(p.numel() for p in head.parameters()):,}" in text
    assert ("MLP baseline" in text) == (head.kind == "mlp")
    assert "{{" not in text
    # The two lines that load it, run.
    lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("FOLDER", str(tmp_path))
    found: dict = {}
    exec(lines, found)
    assert len(lines.splitlines()) == 2
    assert same(found["head"], head)


def test_a_card_without_figures_says_so(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    assert "None were measured" in (tmp_path / "README.md").read_text()


def test_to_the_hub_go_the_same_three_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    sent: dict[str, bytes] = {}

    def upload(self, *, folder_path: Path, repo_id: str, **words: object) -> str:
        sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return "url"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **words: type("Made", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    head = make()
    head.about = dict(ABOUT)
    assert head.push_to_hub("user/name") == "url"
    head.save_pretrained(tmp_path)
    assert sent == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def cut(folder: Path, size: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])


def tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors"), name: value}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def said(folder: Path, key: str, value: object) -> None:
    path = folder / "config.json"
    path.write_text(
        json.dumps({k: v for k, v in {**json.loads(path.read_text()), key: value}.items() if v is not None})
    )


WEIGHT = torch.zeros(C, 16)
DAMAGES = {
    "cut": (lambda f: cut(f, -7), "cannot load"),
    "empty": (lambda f: cut(f, 0), "cannot load"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"a": 1}) * 50), "cannot load"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
    "pickle alone": (lambda f: (f / "model.safetensors").rename(f / "a.bin"), r"pickle files are refused.*a\.bin"),
    "missing tensor": (lambda f: tensor(f, "classifier.bias", None), r"no tensor classifier\.bias"),
    "another tensor": (lambda f: tensor(f, "classifier.other", WEIGHT), r"unknown tensor classifier\.other"),
    "shape": (
        lambda f: tensor(f, "classifier.weight", WEIGHT[:, :9].clone()),
        r"weight is float32 \(3, 9\), not float32 \(3, 16\)",
    ),
    "dtype": (lambda f: tensor(f, "classifier.weight", WEIGHT.half()), r"classifier\.weight is float16"),
    "nan": (lambda f: tensor(f, "classifier.weight", WEIGHT / 0), r"NaN or infinity in classifier\.weight"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot load"),
    "config list": (lambda f: (f / "config.json").write_text("[]"), "cannot load"),
    "no section": (lambda f: said(f, "hash", None), "no 'hash'"),
    "refused": (lambda f: said(f, "hash", {"bits": 13}), "HashConfig, bits 13"),
    "huge": (lambda f: said(f, "width", 10**9), r"is float32 .*, not"),
    "no number": (lambda f: said(f, "width", "wide"), "cannot load"),
    "kind": (lambda f: said(f, "head", "tree"), "tree"),
    "a list for kind": (lambda f: said(f, "head", ["fusion"]), "fusion"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_one_line(how: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    spoil, part = DAMAGES[how]
    spoil(tmp_path)
    for load in (load_head, Head.from_pretrained):
        with pytest.raises(InputError, match=part) as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_another_kind_of_head_is_named(tmp_path: Path) -> None:
    make("mlp", bits=0).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"another kind of head.*got mlp, wanted fusion.*load_head"):
        Head.from_pretrained(tmp_path)
    assert isinstance(load_head(tmp_path), MlpBaseline)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_a_pickle_is_never_opened(suffix: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    path = tmp_path / f"head{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"pickle files are refused.*wanted safetensors"):
        load_head(path)
    (tmp_path / "config.json").write_text(json.dumps(make().build))
    for load in (load_head, Head.from_pretrained):
        with pytest.raises(InputError, match="pickle files are refused"):
            load(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_importing_mmcli_loads_nothing() -> None:
    code = "import sys, mmcli; dir(mmcli); print({'torch', 'pydantic', 'numpy', 'safetensors'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_make_head_gives_what_the_configuration_asks_for() -> None:
    assert type(make("fusion")) is Head
    assert type(make("mlp", bits=0)) is MlpBaseline
    with pytest.raises(ValueError, match="no hash layer for 16 bits"):
        make("mlp")
    for kind in ("fusion", "mlp"):
        head = make(kind, bits=0)
        assert isinstance(head, BaseHead)
        assert head.kind == head.build["head"] == kind


def test_a_loaded_head_trains_like_the_saved_one(tmp_path: Path) -> None:
    head = make(dropout=0.5)
    head.save_pretrained(tmp_path)
    loaded = load_head(tmp_path)
    assert not any(value.is_meta for value in [*loaded.buffers(), *loaded.parameters()])
    loaded.to("cpu", torch.float64).to(torch.float32)
    outputs = []
    for one in (head, loaded):
        torch.manual_seed(3)
        outputs.append(one.train()(*pair()).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("width", [-5, 10**18])
def test_a_width_that_no_head_has_is_one_line(tmp_path: Path, width: int) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": width}))
    for load in (load_head, Head.from_pretrained):
        with pytest.raises(InputError, match="cannot load a head"):
            load(tmp_path)


def test_a_configuration_without_end_is_one_line(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    for load in (load_head, Head.from_pretrained):
        with pytest.raises(InputError, match="cannot load a head"):
            load(tmp_path)
