"""The JSON and parquet files of a run and of a user: whatever stands in them, readers say what is wrong in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from mmcli import InputError, load_head
from mmcli.cache.strict_json import parse_json
from mmcli.pipeline.ablation.records import read_rows, write_rows
from mmcli.pipeline.core.metrics_file import read_history, read_metrics
from mmcli.pipeline.core.run import read_info
from mmcli.pipeline.data.manifest import read_manifest
from mmcli.pipeline.report.collect import read_finished_run
from mmcli.pipeline.tagging.index_file import read_index
from mmcli.pipeline.tagging.requests import read_requests

BROKEN = {
    "nothing": "",
    "half": '{"a": ',
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "NaN": '{"method": NaN}',
    "infinity": '{"method": -Infinity}',
    "5,000 digits": '{"method": ' + "9" * 5000 + "}",
    "NUL": "\0" * 9,
    "a key twice": '{"method": "knn", "method": "mlp"}',
    "a list": "[]",
    "null": "null",
    "text": '"x"',
    "a number": "7",
    "an empty object": "{}",
    "half a pair": '{"method": "\\ud800", "split": "test", "others": []}',
    "nested": '{"others": {}}',
    "not UTF-8": b'{"method": "\xff"}',
    "UTF-16 cut": '{"a": 1}'.encode("utf-16")[:-1],
}


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(next((made / "runs").iterdir()), tmp_path / "run")


FILES: dict[str, Callable[[Path], object]] = {
    "run.json": read_info,
    "metrics.json": read_metrics,
    "checkpoints/checkpoints.json": load_head,
    "model/config.json": lambda run: load_head(run / "model"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", BROKEN)
def test_json_of_a_run_that_makes_no_sense_is_one_line(run: Path, file: str, name: str) -> None:
    text = BROKEN[name]
    (run / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"run|head|checkpoint|metrics") as caught:
        FILES[file](run)
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("category_names", "cat"),
        ("category_names", [1]),
        ("category_names", None),
        ("created", 5),
        ("seed", "1"),
        ("seed", 1.5),
        ("patches", True),
        ("status", None),
        ("kind", []),
        ("version", "1"),
        ("unknown", 1),
    ],
)
def test_a_run_of_other_kinds_is_one_line(run: Path, key: str, value: object) -> None:
    change(run / "run.json", **{key: value})
    with pytest.raises(InputError, match=f"broken run.*{key}"):
        read_info(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mAP", "0.5"),
        ("mAP", [0.5]),
        ("mAP", True),
        ("F1_micro", {}),
        ("P@5", "high"),
        ("method", 1),
        ("split", None),
        ("ci", {"mAP": [0.1]}),
        ("ci", {"mAP": "ab"}),
        ("ci", {"mAP": [0.9, 0.1]}),
        ("ci", [1]),
        ("others", 5),
        ("others", ["x"]),
        ("others", [{"method": "knn"}]),
        ("threshold_tuned", "0.5"),
    ],
)
def test_metrics_of_other_kinds_are_one_line(run: Path, key: str, value: object) -> None:
    change(run / "metrics.json", **{key: value})
    with pytest.raises(InputError, match="damaged metrics"):
        read_metrics(run)


def test_an_infinite_figure_is_refused(run: Path) -> None:
    text = (run / "metrics.json").read_text()
    mAP = json.loads(text)["mAP"]
    (run / "metrics.json").write_text(text.replace(repr(mAP), "1e999", 1))
    with pytest.raises(InputError, match=r"damaged metrics.*mAP is inf"):
        read_metrics(run)


@pytest.mark.parametrize(
    "line", ["x", "[]", "{}", '{"epoch": "1"}', '{"epoch": 1, "loss": "low"}', '{"epoch": NaN}', "[" * 99999]
)
def test_a_history_that_makes_no_sense_is_one_line(run: Path, line: str) -> None:
    path = run / "history.jsonl"
    whole = path.read_text()
    path.write_text(f"{line}\n{whole}")
    with pytest.raises(InputError, match=r"damaged history: .*history\.jsonl, line [01]:"):
        read_finished_run(run)
    path.write_text(whole + line)  # what is still written has no end
    assert len(read_history(run)) == len(whole.splitlines())


@pytest.mark.parametrize(
    "text", ["[" * 99999, '{"path": "a", "path": "b", "caption": "c"}', '{"path": NaN}', "9" * 5000]
)
def test_captions_that_make_no_sense_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"bad captions: .*c\.jsonl, line 1"):
        read_requests([], None, tmp_path / "c.jsonl")


@pytest.mark.parametrize("header", ["[" * 99999, "null", '{"format": "mmcli-index", "version": 1}', '{"a": NaN}'])
def test_an_index_whose_header_makes_no_sense_is_one_line(tmp_path: Path, header: str) -> None:
    save_file({"image_id": np.arange(3)}, tmp_path / "i.safetensors", metadata={"mmcli_index": header})
    with pytest.raises(InputError, match=r"index: .*i\.safetensors"):
        read_index(tmp_path / "i.safetensors")


def test_codes_of_another_kind_are_one_line(run: Path) -> None:
    path = run / "codes" / "test.safetensors"
    whole = load_file(path)
    for name, values in {
        "soft": whole["soft"][:, 0].copy(),
        "labels": whole["labels"] + 1,
        "image_id": whole["image_id"].astype(np.int32),
        "packed": whole["packed"].astype(np.int64),
        "logits": np.full_like(whole["logits"], np.nan),
    }.items():
        save_file(whole | {name: np.ascontiguousarray(values)}, path)
        from mmcli.pipeline.core.results import read_codes

        with pytest.raises(InputError, match="damaged codes"):
            read_codes(run, "test")


def test_parquet_that_claims_too_many_rows_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"image_id": pa.array(np.zeros(8_000_000, np.int64))}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match=r"cannot read the manifest.*got 8,000,000 rows in"):
        read_manifest(path)


def test_rows_of_experiments_of_other_types_are_one_line(tmp_path: Path) -> None:
    from kit import reports

    kit = reports.make_kit(tmp_path / "kit")
    path = kit.ablations / "rows.parquet"
    whole = pq.read_table(path)
    assert read_rows(kit.ablations)
    names = whole.column_names
    for name, values in (("mAP", ["x"] * len(whole)), ("seed", ["1"] * len(whole)), ("value", [1] * len(whole))):
        pq.write_table(whole.set_column(names.index(name), name, pa.array(values)), path)
        with pytest.raises(InputError, match=f"a damaged table: .*the column {name}"):
            read_rows(kit.ablations)
    pq.write_table(whole.drop_columns(["status"]), path)
    with pytest.raises(InputError, match="no column status"):
        read_rows(kit.ablations)


def test_a_table_without_rows_or_without_a_figure_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path, [])
    assert read_rows(tmp_path) == []
    row = {"experiment": "A1", "value": "x", "order": 0, "seed": 1, "status": "finished", "mAP": None}
    write_rows(tmp_path, [row])
    assert read_rows(tmp_path)[0]["mAP"] is None


def test_json_has_one_meaning() -> None:
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00e9"], "b": {}}') == {"a": [1, 2.5, None, True, "é"], "b": {}}
    assert parse_json('{"a": 1}'.encode("utf-16")) == {"a": 1}
    assert parse_json('[{"a": 1}, {"b": 2}]', slim=dict.fromkeys) == [{"a": None}, {"b": None}]
    with pytest.raises(ValueError, match="the key 'a' twice"):
        parse_json('{"a": 1, "b": 2, "a": 3}')
