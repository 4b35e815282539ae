"""Checkpoints by folder or hub id: which commit, which files, and one line for whatever is wrong with them."""

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from mmcli import InputError
from mmcli.pipeline.core.config import DEFAULT_MODEL
from mmcli.pipeline.extraction.encoder import Encoder
from mmcli.pipeline.extraction.model_source import find_model

CPU = torch.device("cpu")
FIRST, SECOND = "a" * 39 + "1", "b" * 39 + "2"


def load(name: object, **options) -> Encoder:
    return Encoder.load(str(name), patches=64, device=CPU, **options)


def change_json(file: str, change):
    """A change of one JSON file of a checkpoint."""

    def apply(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return apply


def change_weights(change):
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return apply


@pytest.fixture
def copied(miniature, tmp_path: Path) -> Path:
    """A copy of the miniature's checkpoint that a test may spoil."""
    return Path(shutil.copytree(miniature.model, tmp_path / "model"))


@pytest.fixture(scope="module")
def other(miniature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same towers with another logit scale: a second version of the checkpoint."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(miniature.model, folder)
    change_weights(lambda t: {**t, "logit_scale": t["logit_scale"] + 1})(folder)
    return folder


# --- Without network: the cache alone.


def test_branch_tag_and_commit_give_one_snapshot(miniature, hub) -> None:
    hub.add(miniature.model, FIRST, "main", "v1", "refs/pr/4")
    for revision in (None, "main", "v1", "refs/pr/4", FIRST, FIRST[:7]):
        source = find_model(DEFAULT_MODEL, revision)
        assert (source.commit, source.folder.name) == (FIRST, FIRST)
    identity = load(DEFAULT_MODEL, revision="v1").identity
    assert (identity.model, identity.revision) == (DEFAULT_MODEL, FIRST)


def test_main_moves_and_a_commit_stays(miniature, other: Path, hub) -> None:
    hub.add(miniature.model, FIRST, "main")
    before = load(DEFAULT_MODEL)
    hub.add(other, SECOND, "main")
    after, pinned = load(DEFAULT_MODEL), load(DEFAULT_MODEL, revision=FIRST)
    assert [item.identity.revision for item in (before, after, pinned)] == [FIRST, SECOND, FIRST]
    assert pinned.logit_scale == before.logit_scale != after.logit_scale


def test_digits_of_two_commits_are_no_revision(miniature, hub) -> None:
    hub.add(miniature.model, FIRST, "main")
    hub.add(miniature.model, FIRST[:-1] + "9")
    with pytest.raises(InputError, match="cannot get the checkpoint"):
        find_model(DEFAULT_MODEL, FIRST[:7])


def test_reading_writes_nothing_into_the_cache(miniature, hub) -> None:
    hub.add(miniature.model, FIRST, "main")
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in hub.root.rglob("*"))
    for path in hub.root.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    load(DEFAULT_MODEL)
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in hub.root.rglob("*")) == before


@pytest.mark.parametrize(("name", "revision"), [(DEFAULT_MODEL, "v2"), ("owner/name", None), (DEFAULT_MODEL, SECOND)])
def test_what_is_not_in_the_cache_is_told_in_one_line(miniature, hub, name: str, revision: str | None) -> None:
    hub.add(miniature.model, FIRST, "main")
    with pytest.raises(InputError, match=f"{name}.*not in the hub's cache.*unset HF_HUB_OFFLINE") as caught:
        find_model(name, revision)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "main", "../../../blobs"])
def test_a_damaged_name_of_a_commit_is_refused(miniature, hub, text: str) -> None:
    hub.add(miniature.model, FIRST, "main")
    (hub.root / f"models--{DEFAULT_MODEL.replace('/', '--')}" / "refs" / "main").write_text(text)
    with pytest.raises(InputError, match="a damaged cache of the hub"):
        find_model(DEFAULT_MODEL)


def test_a_snapshot_without_tokenizer_is_refused(miniature, hub) -> None:
    (hub.add(miniature.model, FIRST, "main") / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=f"the tokenizer is not the checkpoint's: {DEFAULT_MODEL} at {FIRST}"):
        load(DEFAULT_MODEL)


def sharded(folder: Path) -> Path:
    """The checkpoint with its weights in several files."""
    model = transformers.AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_weights_in_several_files_are_loaded_whole_or_not(copied: Path, miniature, hub) -> None:
    snapshot = hub.add(sharded(copied), FIRST, "main")
    ours, whole = (load(name).encode_texts(["a dog"]) for name in (DEFAULT_MODEL, miniature.model))
    np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)
    sorted(snapshot.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match=r"cannot load the weights.*model-00002-of-") as caught:
        load(DEFAULT_MODEL)
    assert "\n" not in str(caught.value)


def test_a_folder_has_no_revision(miniature) -> None:
    with pytest.raises(InputError, match=r"a folder has no revisions.*--revision v1"):
        find_model(str(miniature.model), "v1")


# --- With network: a hub of our own on this machine.


class Hub(BaseHTTPRequestHandler):
    """What the client asks a hub for: the commit of a revision, its files, and their bytes."""

    repo: Path
    refs: dict[str, str]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        info = re.fullmatch("/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch("/api/models/[^/]+/[^/]+/tree/([0-9a-f]{40})", path)
        file = re.fullmatch("/([^/]+/[^/]+)/resolve/[0-9a-f]{40}/(.+)", path)
        if info:
            repo, revision = info[1], info[2] or "main"
            if repo not in {DEFAULT_MODEL, "owner/gated"}:
                return self._say(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            commit = self.refs.get(revision)
            if commit is None:
                return self._say(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return self._say(200, {"id": repo, "sha": commit, "siblings": []})
        if tree:
            files = [
                {"type": "file", "path": item.name, "size": item.stat().st_size, "oid": "0" * 40}
                for item in self.repo.iterdir()
            ]
            return self._say(200, files)
        if file and file[1] == "owner/gated":
            return self._say(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if file and (self.repo / file[2]).is_file():
            data = (self.repo / file[2]).read_bytes()
            return self._say(200, data, {"ETag": f'"{file[2]}-{len(data)}"', "X-Repo-Commit": FIRST})
        return self._say(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    def _say(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(miniature, hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub that answers, and an empty cache."""
    handler = type(
        "OneHub", (Hub,), {"repo": miniature.model, "refs": {"main": FIRST, "v1": FIRST, FIRST[:7]: FIRST}, "asked": []}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    yield handler
    server.shutdown()
    server.server_close()


def test_a_checkpoint_is_downloaded_once_at_its_commit(miniature, online: type[Hub]) -> None:
    assert load(DEFAULT_MODEL).identity.revision == FIRST
    asked = len(online.asked)
    for revision in (None, "v1", FIRST[:7], FIRST):
        assert load(DEFAULT_MODEL, revision=revision).identity.revision == FIRST
    again = online.asked[asked:]
    assert again == [
        f"/api/models/{DEFAULT_MODEL}",
        *(f"/api/models/{DEFAULT_MODEL}/revision/{item}" for item in ("v1", FIRST[:7])),
    ]


def test_what_is_whole_in_the_cache_is_not_asked_for(miniature, online: type[Hub], hub) -> None:
    """Other programs leave snapshots without a list of their files; without network each question takes half a minute."""
    snapshot = hub.add(miniature.model, FIRST)
    (snapshot.parent.parent / "trees").write_text("nothing can be written there")
    assert load(DEFAULT_MODEL).identity.revision == FIRST
    assert online.asked == [f"/api/models/{DEFAULT_MODEL}"]
    assert load(DEFAULT_MODEL, revision=FIRST).identity.revision == FIRST
    assert len(online.asked) == 1


def test_an_interrupted_download_is_completed(copied: Path, online: type[Hub], hub) -> None:
    online.repo = sharded(copied)
    snapshot = hub.add(copied, FIRST)
    for name in ("tokenizer.json", next(snapshot.glob("model-00002*")).name):
        (snapshot / name).unlink()
        assert load(DEFAULT_MODEL).identity.revision == FIRST
        assert (snapshot / name).is_file()


def test_what_the_hub_refuses_is_told_in_one_line(online: type[Hub], hub) -> None:
    refusals = {
        ("google/siglip2-base-patch16-naflx", None): "check the spelling",
        (
            "owner/gated",
            None,
        ): r"a gated repository.*accept its terms at http.*/owner/gated and log in with `hf auth login`",
        (DEFAULT_MODEL, "v9"): "no such revision on the hub",
        (DEFAULT_MODEL, "no such branch"): "no such revision on the hub",
    }
    for (name, revision), message in refusals.items():
        with pytest.raises(InputError, match=f"cannot get the checkpoint: {name}.*{message}") as caught:
            find_model(name, revision)
        assert "\n" not in str(caught.value)


# --- Files that are not what they should be.


WEIGHTS = {
    "compiled": (
        lambda t: {f"_orig_mod.{k}": v for k, v in t.items()},
        r'missing .*unknown .*begin with "_orig_mod\.".*save_pretrained',
    ),
    "wrapped": (lambda t: {f"module.{k}": v for k, v in t.items()}, r'begin with "module\."'),
    "no head": (
        lambda t: {k: v for k, v in t.items() if "vision_model.head" not in k},
        r"11 missing \(vision_model\.head",
    ),
    "no scale": (lambda t: {k: v for k, v in t.items() if k != "logit_scale"}, r"1 missing \(logit_scale\)"),
    "no text": (lambda t: {k: v for k, v in t.items() if "text_model" not in k}, "missing"),
    "a third layer": (
        lambda t: t | {k.replace("layers.1", "layers.2"): v.clone() for k, v in t.items()},
        r"32 unknown",
    ),
    "quantised": (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "weights that are no floats: .* I8 in"),
    "another shape": (
        lambda t: {k: v[:-1] if k == "text_model.head.bias" else v for k, v in t.items()},
        r"another shape .*text_model\.head\.bias: \[63\]",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_the_towers_are_refused(copied: Path, name: str) -> None:
    change, message = WEIGHTS[name]
    change_weights(change)(copied)
    with pytest.raises(InputError, match=message) as caught:
        load(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_in_any_float_and_foreign_tensors_are_read(copied: Path, miniature, dtype: torch.dtype) -> None:
    change_weights(
        lambda t: (
            {k: v.to(dtype) for k, v in t.items()}
            | {"classifier.weight": torch.ones(2, 2), "text_model.embeddings.position_ids": torch.arange(64)[None]}
        )
    )(copied)
    np.testing.assert_allclose(
        load(copied).encode_texts(["a dog"]), load(miniature.model).encode_texts(["a dog"]), rtol=0.1, atol=0.05
    )


DAMAGE = {
    "a pointer": (
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "git lfs pull",
    ),
    "half": (lambda f: f.write_bytes(f.read_bytes()[:5000]), "a damaged or partial file"),
    "empty": (lambda f: f.write_bytes(b""), "an empty file"),
    "pickle": (lambda f: (f.unlink(), torch.save({}, f.with_name("pytorch_model.bin"))), "cannot load the weights"),
    "newer dtype": (lambda f: f.write_bytes(f.read_bytes().replace(b'"F32"', b'"F4X"', 1)), "model.safetensors"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "cannot load the weights"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights_end_in_one_line(copied: Path, name: str) -> None:
    change, message = DAMAGE[name]
    change(copied / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        load(copied)
    assert "\n" not in str(caught.value)


def _set(section: str, key: str, value: object):
    def change(tree):
        tree[section][key] = value
        return tree

    return change


VALUES = [
    ("config.json", _set("text_config", "hidden_size", "64"), "configuration"),
    ("config.json", _set("text_config", "num_attention_heads", 0), "cannot load"),
    ("config.json", _set("vision_config", "num_attention_heads", 7), "cannot load"),
    ("config.json", _set("vision_config", "num_hidden_layers", 10**6), "weights of fewer layers"),
    ("config.json", _set("vision_config", "num_hidden_layers", 1), "unknown"),
    ("config.json", _set("vision_config", "hidden_size", 10**7), "embeddings 10000000 and 64 wide"),
    ("config.json", _set("text_config", "vocab_size", 10**12), "shape"),
    ("config.json", _set("vision_config", "num_patches", 60), "num_patches 60"),
    ("config.json", _set("vision_config", "num_patches", -4), "num_patches -4"),
    ("config.json", _set("vision_config", "patch_size", 0), "patch_size 0"),
    ("config.json", _set("vision_config", "patch_size", [16, 16]), "patch_size"),
    ("config.json", _set("vision_config", "num_channels", 1), "1 channels"),
    ("config.json", _set("vision_config", "vision_use_head", False), "no pooling head"),
    ("config.json", _set("text_config", "max_position_embeddings", 128), "below the trained one.*128"),
    ("config.json", _set("text_config", "hidden_act", "unheard"), "cannot load"),
    ("config.json", lambda tree: {**tree, "dtype": "float7"}, "cannot load"),
    ("config.json", lambda tree: {**tree, "model_type": ["siglip2"]}, "configuration"),
    ("config.json", lambda tree: {**tree, "text_config": []}, "cannot load|checkpoint"),
    ("config.json", lambda tree: [tree], "configuration"),
    ("preprocessor_config.json", lambda tree: {**tree, "image_mean": None}, "image_mean"),
    ("preprocessor_config.json", lambda tree: {**tree, "image_mean": [0.5]}, "image_mean"),
    ("preprocessor_config.json", lambda tree: {**tree, "image_std": [0.5, 0.0, 0.5]}, "image_std"),
    ("preprocessor_config.json", lambda tree: {**tree, "rescale_factor": "many"}, "rescale_factor"),
    ("preprocessor_config.json", lambda tree: {**tree, "resample": 17}, "resample|image processor"),
    ("preprocessor_config.json", lambda tree: {**tree, "patch_size": None}, "patch_size"),
    ("preprocessor_config.json", lambda tree: {**tree, "patch_size": 14}, "patch_size 14, wanted 16"),
    ("preprocessor_config.json", lambda tree: {**tree, "do_rescale": False}, "do_rescale off"),
    ("preprocessor_config.json", lambda tree: {**tree, "do_normalize": None}, "do_normalize"),
    ("preprocessor_config.json", lambda tree: 7, "image processor"),
    ("tokenizer_config.json", lambda tree: {**tree, "pad_token": None}, "tokenizer"),
    ("tokenizer_config.json", lambda tree: [tree], "tokenizer"),
    ("tokenizer_config.json", lambda tree: {**tree, "tokenizer_class": 3}, "tokenizer"),
    ("tokenizer.json", lambda tree: {**tree, "normalizer": {"type": "Unheard"}}, "tokenizer"),
    ("tokenizer.json", lambda tree: {**tree, "post_processor": None}, "no eos token"),
    ("tokenizer.json", lambda tree: {**tree, "model": {}}, "tokenizer"),
    ("tokenizer.json", _set("post_processor", "special_tokens", {}), "tokenizer"),  # a panic in Rust
    ("tokenizer.json", lambda tree: None, "tokenizer"),
]


@pytest.mark.parametrize(("file", "change", "message"), VALUES)
def test_values_of_a_wrong_kind_end_in_one_line(
    copied: Path, capfd: pytest.CaptureFixture[str], file: str, change, message: str
) -> None:
    change_json(file, change)(copied)
    with pytest.raises(InputError, match=message) as caught:
        load(copied)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_settings_that_mean_the_same_are_read(copied: Path, miniature) -> None:
    change_json(
        "preprocessor_config.json",
        lambda tree: {**tree, "image_mean": 0.5, "image_std": 0.5, "size": {"shortest_edge": 9}},
    )(copied)
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    np.testing.assert_array_equal(load(copied).encode_images([image]), load(miniature.model).encode_images([image]))


def test_keys_of_a_newer_tokenizer_write_nothing(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    token = {"content": "<pad>", "special": True, "unheard": 1, "__type": "AddedToken"}
    change_json("tokenizer_config.json", lambda tree: {**tree, "pad_token": token})(copied)
    load(copied)
    assert capfd.readouterr() == ("", "")


def test_a_library_that_is_not_there_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tokenizers of SigLIP 1 are SentencePiece's."""

    def needs(*_: object, **__: object) -> None:
        raise ImportError(
            "\nSiglipTokenizer requires the SentencePiece library but it was not found in your environment."
        )

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", needs)
    with pytest.raises(InputError, match=r"the tokenizer.*SentencePiece.*pip install sentencepiece"):
        load(copied)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_is_never_run(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Not even where the person at the terminal would say yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    classes = {
        "AutoConfig": "evil.Evil",
        "AutoImageProcessor": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    unheard = {"model_type": "unheard", "image_processor_type": "Evil", "tokenizer_class": "Evil", "auto_map": classes}
    (copied / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Evil: pass\n")
    change_json(file, lambda tree: {**tree, **unheard})(copied)
    with contextlib.suppress(InputError):
        load(copied)
    assert not (tmp_path / "run").exists()


def test_hidden_files_beside_a_checkpoint_change_no_key(copied: Path) -> None:
    before = load(copied).identity
    (copied / "._config.json").write_bytes(b"\0\5\x16\7")
    assert load(copied).identity == before


def test_a_path_that_is_not_utf_8_ends_in_one_line(miniature, tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    shutil.copytree(miniature.model, folder)
    with pytest.raises(InputError, match="not UTF-8") as caught:
        load(folder)
    str(caught.value).encode()
