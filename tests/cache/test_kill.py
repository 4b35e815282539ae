"""A writer that is killed leaves nothing that reads as whole, and the next one ends with the same store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmcli.cache import Store, StoreMissing, StoreUnfinished, verify

ROWS = 5


def killed(how: str, scenario: str, root: Path, stride: int = 1) -> int:
    script = Path(__file__).with_name("kill_writer.py")
    done = subprocess.run(
        [sys.executable, script, how, scenario, root, str(stride)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # the package `kit`
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def resume_and_compare(kit, root: Path, scenario: str, wanted: dict) -> dict[str, int]:
    """Check every folder as it was left, then resume it; how many were left readable, and how many shards were kept."""
    seen = {"readable": 0, "kept": 0}
    for folder in sorted(path for path in root.iterdir() if path.name.isdigit()):
        try:
            store = Store.open(folder)
        except (StoreUnfinished, StoreMissing):
            pass
        else:
            # Killed after the manifest was renamed; a store that is to be replaced or mended may still be the old one.
            seen["readable"] += 1
            old = kit.Data(seed=1) if scenario == "replace" else kit.Data()
            if scenario != "mend":
                assert store.load().v_img.tolist() in [d.v_img.astype("f2").tolist() for d in (kit.Data(), old)]
        overwrite = scenario == "replace"
        with kit.Data().writer(folder, kit.key(), shard_rows=ROWS, overwrite=overwrite) as writer:
            assert scenario == "mend" or writer.damaged == []
            seen["kept"] += 4 - len(writer.missing("image")) - len(writer.missing("text"))
            assert not list(folder.glob(".*.tmp"))
            kit.Data().fill(writer)
            writer.finish()
        assert kit.content(folder) == wanted
        assert verify(folder).problems == ()
    return seen


# Everything happens in "new"; the others add a few steps of their own, so every third or fifth of theirs has to do.
@pytest.mark.parametrize(("scenario", "stride"), [("new", 1), ("mend", 2), ("reuse", 3), ("replace", 3)])
def test_killed_at_every_step(kit, tmp_path, scenario, stride):
    wanted = kit.content(kit.Data().write(tmp_path / "whole", kit.key(), shard_rows=ROWS))
    n_points = killed("points", scenario, tmp_path / "kills", stride)
    assert n_points * stride > {"new": 30, "mend": 8, "reuse": 25, "replace": 35}[scenario]
    seen = resume_and_compare(kit, tmp_path / "kills", scenario, wanted)
    assert 0 < seen["readable"] < n_points / 3, seen
    if scenario in {"new", "reuse"}:
        # A shard that was renamed is kept: on the average about half of them.
        assert seen["kept"] > n_points
    for sibling in (tmp_path / "kills").glob("*-sibling"):
        assert verify(sibling).problems == ()


def test_killed_at_any_time(kit, tmp_path):
    wanted = kit.content(kit.Data().write(tmp_path / "whole", kit.key(), shard_rows=ROWS))
    assert killed("times", "new", tmp_path / "kills") > 0
    resume_and_compare(kit, tmp_path / "kills", "new", wanted)
