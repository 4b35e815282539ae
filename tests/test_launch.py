"""What a launcher says in the environment: empty is unset, and what cannot be is refused in one line."""

import os

import pytest

from mmcli import InputError
from mmcli.pipeline.finetuning.distributed import Launch, is_first, open_group, read_launch

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {
    "WORLD_SIZE": "4",
    "RANK": "2",
    "LOCAL_WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def give(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize(
    "variables",
    [
        {},
        dict.fromkeys(NAMES, ""),
        {"WORLD_SIZE": " ", "RANK": "\t"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""},
        {"RANK": "0"},
        {"LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "x"},
    ],
)
def test_without_a_launcher_there_is_one_process(environment, variables) -> None:
    environment(variables)
    assert read_launch() == Launch()
    assert is_first()
    with open_group("cpu") as group:
        assert (group.rank, group.size) == (0, 1)
    # torch would read an empty variable as a number.
    assert not any(os.environ.get(name, "1").strip() == "" for name in NAMES)


def test_a_launcher_is_read(environment) -> None:
    environment(WHOLE)
    assert read_launch() == Launch(rank=2, size=4, local_size=2)
    assert not is_first()
    environment({"LOCAL_WORLD_SIZE": ""})
    assert read_launch() == Launch(rank=2, size=4, local_size=1)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: got 2 without RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: got '-1'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE: got '2.0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: got"),
        ({"RANK": "1"}, "RANK: got 1 without WORLD_SIZE"),
        ({"RANK": "x"}, "RANK: got 'x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: got '-1'"),
        ({**WHOLE, "RANK": "4"}, "RANK: got 4, wanted less than WORLD_SIZE, here 4"),
        ({**WHOLE, "LOCAL_RANK": "2"}, "LOCAL_RANK: got 2"),
        ({**WHOLE, "MASTER_ADDR": ""}, "WORLD_SIZE: got 4 without MASTER_ADDR"),
        ({**WHOLE, "MASTER_PORT": ""}, "WORLD_SIZE: got 4 without MASTER_PORT"),
        ({**WHOLE, "MASTER_PORT": "70000"}, "MASTER_PORT: got '70000'"),
        ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_PORT: got 'http'"),
        ({**WHOLE, "LOCAL_RANK": ""}, "WORLD_SIZE: got 4 without LOCAL_RANK"),
    ],
)
def test_what_no_launcher_sets_is_one_line(environment, variables, said: str) -> None:
    environment(variables)
    with pytest.raises(InputError) as error, open_group("cpu"):
        pass
    assert said in str(error.value)
    assert "unset it" in str(error.value)


def test_finetune_refuses_it_before_it_loads_anything(environment, mmcli, miniature) -> None:
    environment({"WORLD_SIZE": "2"})
    code, out, err = mmcli("finetune", "--model", miniature.model, "--patches", 64, "--data", miniature.data)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "WORLD_SIZE" in err
