"""YAML from a user: what is wrong with it is one line, at once, whatever it would unfold to."""

import time
from pathlib import Path

import pytest
import yaml

from mmcli import InputError
from mmcli.pipeline.ablation.experiments import read_experiments
from mmcli.pipeline.core.config import dump_config, load_config, parse_settings
from mmcli.pipeline.core.strict_yaml import MOST_BYTES, parse_yaml, read_yaml

_LEVELS = [f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefghi", "bcdefghij", strict=True)]

REFUSED = {
    "an alias bomb": ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(_LEVELS), "more than 10 aliases"),
    "itself": ("a: &a [*a]", "alias a of what it stands in"),
    "no such alias": ("a: *b", "undefined alias"),
    "flow levels": ("[" * 9999, "more than 20 levels"),
    "block levels": ("- " * 3000 + "x", "more than 20 levels"),
    "mappings": ("".join(" " * i + "a:\n" for i in range(400)), "more than 20 levels"),
    "5,000 digits": ("a: " + "9" * 5000, r"5,000 characters\), which is no number of 64 bits"),
    "hexadecimal": ("a: 0x" + "f" * 9000, "no number of 64 bits"),
    "infinity": ("knn: {tau: .inf}", r"key knn\.tau: got inf"),
    "NaN": ("knn: {tau: .nan}", r"key knn\.tau: got nan"),
    "a large exponent": ("knn: {tau: 1.0e+999}", r"key knn\.tau: got inf"),
    "octal": ("a: 010", "another base than ten"),
    "base 60": ("a: 1:30", "another base than ten"),
    "a key twice": ("a: 1\nb: 2\na: 3", "line 3, column 1.*the key a twice"),
    "a key twice inside": ("a: {b: 1, b: 2}", "the key b twice"),
    "a merge key": ("a: &a {b: 1}\nc:\n  <<: *a", "merge key"),
    "a number as a key": ("1: a", "1 as a key"),
    "a truth value as a key": ("on: a", "on as a key"),
    "null as a key": ("~: a", "as a key"),
    "a list as a key": ("? [a]\n: b", "a list or mapping as a key"),
    "a tag of Python": ("a: !!python/object/apply:os.system [ls]", "tag .*os.system"),
    "binary": ("a: !!binary xyz", "the tag"),
    "an impossible date with its tag": ("a: !!timestamp 2024-13-45", "the tag"),
    "a tag of nobody": ("a: !x 1", "the tag !x"),
    "NUL": ("a: \0", "special characters"),
    "a tab": ("a:\n\tb: 1", "cannot start any token"),
    "two documents": ("a: 1\n---\nb: 2", "another document"),
    "another version": ("%YAML 9.9\n---\na: 1", "incompatible"),
    "no such letter": ('a: "\\U99999999"', "broken"),
    "half a pair": ('a: "\\ud800"', "surrogates"),
    "a long key": ("x" * 2000 + ": 1", "broken"),
    "a megabyte": ("a: " + "x" * MOST_BYTES, "more than 262,144 bytes"),
    "text": ("just text", "got str, wanted sections"),
    "a list": ("- 1", "got list, wanted sections"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_that_is_refused_is_one_line_at_once(mmcli, tmp_path: Path, name: str) -> None:
    text, message = REFUSED[name]
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    began = time.monotonic()
    code, out, err = mmcli("train-head", "--config", "c.yaml", "--print-config")
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert len(err) < 600
    assert time.monotonic() - began < 5
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_one_line(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "c.yaml").write_bytes("data: {dataset: größe}".encode(encoding))
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(tmp_path / "c.yaml")


def test_a_byte_order_mark_and_windows_lines_are_taken(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("\ufeffhash:\r\n  bits: 32\r\n".encode())
    assert load_config(tmp_path / "c.yaml").hash.bits == 32


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"# nothing\n")
    assert load_config(tmp_path / "c.yaml") == load_config()


def test_what_is_healthy_means_what_it_says() -> None:
    text = "a: &few [1, -2.5, 1.0e-3, 0x1F, 0, true, null, ~]\nb: *few\nc: 2024-13-45\nd: 2024-01-02\ne: '010'"
    few = [1, -2.5, 1e-3, 31, 0, True, None, None]
    assert parse_yaml(text) == {"a": few, "b": few, "c": "2024-13-45", "d": "2024-01-02", "e": "010"}
    assert parse_yaml("") is None


def test_an_impossible_date_where_a_number_belongs_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("hash: {bits: 2024-13-45}")
    with pytest.raises(InputError, match=r"key hash\.bits: got '2024-13-45'"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("value", ["9" * 5000, "&a [*a]", "[" * 3000, "!!python/name:x y"])
def test_settings_and_experiments_are_read_in_the_same_way(tmp_path: Path, value: str) -> None:
    with pytest.raises(InputError, match="cannot read a setting"):
        parse_settings([f"hash.bits={value}"])
    (tmp_path / "e.yaml").write_text(f"A1: {value}")
    with pytest.raises(InputError, match="broken experiments"):
        read_experiments(str(tmp_path / "e.yaml"))


def test_every_file_that_is_shipped_or_written_reads_back(repo: Path) -> None:
    for path in (repo / "pipeline" / "grids").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert read_yaml(path, "a file", wanted="YAML") == yaml.safe_load(text)
    written = dump_config(load_config())
    assert parse_yaml(written) == yaml.safe_load(written)


@pytest.mark.parametrize("name", ["x" * 100_000, "a\\0b", "\\ud800", "nowhere/e.yaml"])
def test_experiments_that_extend_what_is_not_there_are_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "e.yaml").write_text(f'extends: "{name}"')
    with pytest.raises(InputError, match=r"(cannot read|broken) experiments") as caught:
        read_experiments(str(tmp_path / "e.yaml"))
    assert len(str(caught.value)) < 1500


def test_experiments_that_extend_one_another_are_one_line(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {tmp_path / other}.yaml")
    with pytest.raises(InputError, match="extend themselves"):
        read_experiments(str(tmp_path / "a.yaml"))
