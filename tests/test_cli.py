"""The contract of the command line: help without torch, one line of error, exit codes, JSON alone on stdout."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmcli import cli

COMMANDS = (
    (),
    ("demo",),
    ("prepare",),
    ("extract",),
    ("train-head",),
    ("knn-eval",),
    ("zero-shot",),
    ("compare",),
    ("cache",),
    ("cache", "info"),
    ("cache", "verify"),
    ("cache", "export"),
    ("cache", "import"),
    ("predict",),
    ("index",),
    ("index", "build"),
    ("index", "add"),
    ("index", "remove"),
    ("index", "info"),
)


def mmcli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmcli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


HELP = """
import contextlib, io, json, sys
from mmcli.cli import main

heavy = {"torch", "transformers", "faiss", "numpy", "pyarrow", "h5py", "PIL", "sklearn", "matplotlib"}
for words in json.loads(sys.argv[1]):
    sys.argv = ["mmcli", *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as end:
            assert not end.code, (words, end.code)
    assert f"Usage: {' '.join(['mmcli', *words])}" in out.getvalue(), (words, out.getvalue())
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
"""


def test_help_loads_nothing_heavy() -> None:
    """One process for all commands: what an earlier one loaded would be seen at the later ones."""
    command = [sys.executable, "-c", HELP, json.dumps(COMMANDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_configuration_is_printed_without_torch_or_store(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.argv = ['mmcli', 'train-head', '--print-config', *sys.argv[1:]]\n"
        "from mmcli.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'faiss', 'numpy', 'pyarrow', 'h5py', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    from mmcli.pipeline.core.config import load_config

    for words in ((), ("--json",)):
        done = subprocess.run(
            [sys.executable, "-c", code, "--head", "mlp", "--seed", "7", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        file = tmp_path / "printed.yaml"
        file.write_text(done.stdout)  # JSON is YAML too
        config = load_config(file)
        assert (config.head, config.hash.bits, config.training.monitor, config.hardware.seed) == (
            "mlp",
            0,
            "classifier",
            7,
        )
        file.unlink()
        assert list(tmp_path.iterdir()) == []
    assert json.loads(done.stdout)["head"] == "mlp"


def test_help_lists_options_by_what_they_are_for() -> None:
    text = mmcli("train-head", "--help").stdout
    panels = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert panels == ["Head", "Loss", "Training", "Device and seed", "Configuration", "Store and run", "Options"]
    assert len(re.findall(r"^  (?:-\w, )?--", text, re.MULTILINE)) == text.count("\n  -") > 30


def test_an_option_of_a_key_is_described_by_its_field() -> None:
    """Name, type, default and help stand once, beside the field; every key with an option is taken by a command."""
    from mmcli.pipeline.core.config import OPTION_NAMES, KeyOption

    help_ = {name: " ".join(mmcli(name, "--help").stdout.split()) for name in ("train-head", "finetune", "knn-eval")}
    for key in OPTION_NAMES:
        option = KeyOption(key)
        text = " ".join(option.help.split())
        shown = [page for page in help_.values() if f"{option.flag} " in page]
        assert shown, key
        assert any(text.replace("-", "") in page.replace("- ", "").replace("-", "") for page in shown), key
    gamma = KeyOption("loss.hash_weight")
    assert (gamma.flag, gamma.type, gamma.default) == ("--gamma", float, "the preset's")
    assert (KeyOption("training.ema_decay").type, KeyOption("training.ema_decay").default) == (float, "")


def test_every_command_of_the_readme_exists(repo: Path) -> None:
    """Commands in fenced blocks of README and docs, up to their first option, answer to --help."""
    blocks = (repo / "README.md").read_text().split("```")[1::2]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    named = {line.split()[1] for line in lines if line.startswith("mmcli ")}
    assert named >= {"prepare", "extract", "train-head", "knn-eval"}
    assert named <= {words[0] for words in COMMANDS if words}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("train-head", "--bits", "33"), ("--bits", "33", "multiple of 8")),
        (("train-head", "--bits", "x"), ("--bits", "integer")),
        (("train-head", "--fusion", "sum"), ("--fusion", "hadamard_magnitude")),
        (("train-head",), ("store", "data/cache", "mmcli extract")),
        (("train-head", "--store", "nowhere"), ("nowhere", "mmcli extract")),
        (("train-head", "--set", "hash.bit=8"), ("hash.bit", "did you mean bits")),
        (("train-head", "--set", "hash.bits"), ("--set", "KEY=VALUE")),
        (("train-head", "--head", "mlp", "--bits", "64"), ("hash.bits", "got 64", "wanted 0 with --head mlp")),
        (("train-head", "--head", "mlp", "--monitor", "knn"), ("training.monitor", "got knn", "wanted classifier")),
        (("train-head", "--magnitude", "shuffled", "--fusion", "concat"), ("--magnitude", "'shuffled'", "concat")),
        (("train-head", "--ema", "1"), ("--ema", "got 1.0", "less than 1")),
        (("train-head", "--seeds", "0"), ("--seeds", "1")),
        (("train-head", "--preset", "direction"), ("--preset", "direction-only")),
        (("train-head", "--resume", "x", "--bits", "0"), ("--resume", "got --bits", "new run")),
        (("train-head", "--resume", "x", "--seeds", "2"), ("--resume", "got --seeds")),
        (("train-head", "--resume", "x", "--force"), ("--resume", "got --force")),
        (("train-head", "--resume", "nowhere"), ("nowhere", "mmcli train-head")),
        (("train-head", "--print-config", "--config", "nowhere.yaml"), ("nowhere.yaml",)),
        (("train-head", "--config", "nowhere.yaml"), ("nowhere.yaml",)),
        (("knn-eval",), ("no run", "mmcli train-head")),
        (("knn-eval", "--run", "nowhere"), ("nowhere", "mmcli train-head")),
        (("zero-shot",), ("store", "mmcli extract")),
        (("zero-shot", "--prompts", "nowhere.txt"), ("nowhere.txt", "one template a line")),
        (("zero-shot", "--inputs", "caption"), ("--inputs", "both")),
        (("compare", "nowhere", "there"), ("nowhere", "run folder")),
        (("prepare",), ("data/coco",)),
        (("prepare", "--data", "nowhere"), ("nowhere",)),
        (("extract",), ("manifest.parquet", "mmcli prepare")),
        (("extract", "--ray-address", "auto"), ("--ray-address", "--engine ray")),
        (("extract", "--device", "abacus"), ("abacus", "--device auto")),
        (("cache", "info"), ("store", "mmcli extract")),
        (("cache", "export", "--out", "x"), ("store", "mmcli extract")),
        (("cache", "export"), ("--out",)),
        (("cache", "import"), ("--images",)),
        (("cache", "import", "--images", "x", "--texts", "y", "--name", "z"), ("manifest.parquet", "mmcli prepare")),
        (("predict",), ("nothing to tag", "IMAGE")),
        (("predict", "a.jpg", "--caption", "x"), ("no run", "mmcli train-head")),
        (("index", "build"), ("no run", "mmcli train-head")),
        (("index", "add"), ("--manifest",)),
        (("index", "remove", "--ids", "1,x"), ("--ids", "'x'")),
        (("index", "info"), ("no run", "mmcli train-head")),
        (("no-such-command",), ("no-such-command",)),
        (("prepare", "--no-such-option"), ("--no-such-option",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch, capsys, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mmcli", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, ""), err
    assert err.count("\n") == 1, err
    assert err.startswith("mmcli: ")
    for part in parts:
        assert part in err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_the_process_with_2(tmp_path: Path) -> None:
    done = mmcli("train-head", "--store", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("RuntimeError('a bug')", 1, r"(?s)Traceback.*RuntimeError: a bug"),
        ("FileNotFoundError(2, 'No such file', 'a bug')", 1, r"(?s)Traceback.*'a bug'"),
        ("OSError(28, 'No space left on device', 'runs/x')", 1, r"mmcli: No space left on device: runs/x; .*"),
        ("KeyboardInterrupt", 130, r"mmcli: interrupted.*"),
    ],
)
def test_a_bug_a_full_disk_and_ctrl_c_are_told_apart(tmp_path: Path, error: str, code: int, said: str) -> None:
    script = (
        "import mmcli.cli, mmcli.pipeline.data.prepare\n"
        f"def broken(*a, **k): raise {error}\n"
        "mmcli.pipeline.data.prepare.prepare = broken\n"
        "import sys; sys.argv = ['mmcli', 'prepare']\nmmcli.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert re.fullmatch(said, done.stderr.strip())


def test_version() -> None:
    done = mmcli("--version")
    assert done.returncode == 0
    assert done.stdout.strip().count(".") == 2


def test_input_error_is_always_one_line() -> None:
    from mmcli import InputError

    error = InputError("what\nis wrong", where="a\nb", got="c\n\nd", wanted="e", do="mend  it")
    assert str(error) == r"what is wrong: a\nb: got c\n\nd, wanted e; mend it"
    assert json.loads(json.dumps(str(error))) == str(error)
