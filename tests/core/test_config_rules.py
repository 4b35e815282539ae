"""What one key says about others, and what a person is told before training."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli import InputError
from mmcli.pipeline.core.config import Config, dump_config, load_config, notices, resolve
from mmcli.pipeline.core.config_reference import reference
from mmcli.pipeline.core.presets import PRESETS

MLP = {"head": "mlp"}
ALPHA, READS_ONE, BATCH = "alpha changes nothing", "other modality", "is taken as 2"


@pytest.mark.parametrize("preset", ["recommended", "plan"])
def test_the_mlp_has_no_bits_and_no_neighbours(preset: str) -> None:
    config = resolve(load_config(options={**MLP, "preset": preset}))
    assert (config.hash.bits, config.training.monitor, config.knn.distance_metric) == (0, "classifier", "cosine")
    assert config.head == "mlp"
    # What is not said about is what it was.
    plain = load_config(options={"preset": preset})
    assert (config.loss, config.optimizer, config.fusion) == (plain.loss, plain.optimizer, plain.fusion)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**MLP, "hash.bits": 64}, "hash.bits: got 64, wanted 0 with --head mlp"),
        ({**MLP, "training.monitor": "knn"}, "training.monitor: got knn, wanted classifier with --head mlp"),
        ({**MLP, "fusion.adapter": "linear"}, "fusion.adapter: got linear, wanted none with --head mlp"),
        ({**MLP, "fusion.magnitude": "shuffled"}, "fusion.magnitude: got shuffled, wanted own with --head mlp"),
        ({**MLP, "fusion.type": "concat"}, "fusion.type: got concat"),
        ({**MLP, "preset": "direction-only"}, "fusion.type: got hadamard"),
        ({**MLP, "knn.distance_metric": "hamming"}, "knn.distance_metric: got hamming, wanted cosine with --head mlp"),
        (
            {"hash.bits": 0, "knn.distance_metric": "hybrid"},
            "knn.distance_metric: got hybrid, wanted cosine with --bits 0",
        ),
    ],
)
def test_keys_that_leave_each_other_no_room_are_one_line(options: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(load_config(options=options))
    line = str(caught.value)
    assert said in line
    assert "leave it out, or give --" in line
    assert "\n" not in line


def test_what_the_mlp_can_do_may_be_said() -> None:
    said = {**MLP, "hash.bits": 0, "training.monitor": "classifier", "fusion.inputs": "image", "fusion.adapter": "none"}
    assert resolve(load_config(options=said)).fusion.inputs == "image"


def test_without_bits_neighbours_are_found_by_cosine() -> None:
    config = resolve(load_config(options={"hash.bits": 0}))
    assert (config.knn.distance_metric, config.training.monitor) == ("cosine", "knn")
    for options in ({}, {"knn.distance_metric": "hybrid"}):
        plain = load_config(options=options)
        assert resolve(plain) == plain


@given(
    head=st.sampled_from(["fusion", "mlp"]),
    preset=st.sampled_from(sorted(PRESETS)),
    bits=st.sampled_from([None, 0, 32]),
    monitor=st.sampled_from([None, "knn", "classifier"]),
    metric=st.sampled_from([None, "hamming", "cosine"]),
)
def test_a_resolved_configuration_stays_and_reads_back(head, preset, bits, monitor, metric, tmp_path_factory) -> None:
    given_ = {
        "head": head,
        "preset": preset,
        "hash.bits": bits,
        "training.monitor": monitor,
        "knn.distance_metric": metric,
    }
    try:
        config = resolve(load_config(options={key: value for key, value in given_.items() if value is not None}))
    except InputError:
        return  # which is refused is tested above
    file: Path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_text(dump_config(config))
    assert resolve(config) == resolve(load_config(file)) == config
    assert Config.model_validate(config.model_dump()) == config
    assert head != "mlp" or (config.hash.bits, config.training.monitor) == (0, "classifier")
    assert config.hash.bits or config.knn.distance_metric == "cosine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, []),
        ({"preset": "plan"}, []),
        ({"loss.cosine_weight": 0.5}, [ALPHA]),
        ({"fusion.adapter": "none"}, [ALPHA]),
        ({"fusion.adapter": "linear", "loss.cosine_weight": 0.5}, []),
        ({"loss.cosine_weight": 0.0}, []),
        ({"fusion.inputs": "image"}, []),
        ({"fusion.inputs": "image", "loss.cosine_weight": 0.5}, [READS_ONE]),
        ({"fusion.inputs": "text", "fusion.adapter": "linear"}, [READS_ONE]),
        ({**MLP, "loss.cosine_weight": 0.5}, ["has no directions"]),
        ({"training.batch_size": 1}, [BATCH]),
        ({"training.batch_size": 1, "hash.batch_norm": False}, []),
        ({"training.batch_size": 1, "hash.bits": 0}, []),
    ],
)
def test_only_what_was_given_is_remarked_upon(options: dict, said: list[str]) -> None:
    lines = notices(resolve(load_config(options=options)))
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert line.startswith("note: ")
        assert part in line


def test_the_configuration_page_is_the_schema(repo: Path) -> None:
    """Mend with: python -m mmcli.pipeline.core.config_reference > docs/configuration.md"""
    page = (repo / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    assert all(cell.strip() for row in rows for cell in (row.split("|")[1], row.split("|")[2], row.split("|")[5]))
    assert "| `hash.batch_norm` | bool | true, plan: false |" in page
