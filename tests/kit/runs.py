"""Runs without a training, as tests of what is written into them need."""

from mmcli.pipeline.core.run import RunInfo, now


def make_info(names: str = "abcd", kind: str = "zero-shot") -> RunInfo:
    """The record of a run whose categories are named by letters."""
    return RunInfo(
        kind=kind,
        status="running",
        created=now(),
        config_digest="0" * 8,
        preset="plan",
        seed=1,
        store="s",
        store_digest="d",
        model="m",
        patches=64,
        manifest_sha256="f",
        category_names=tuple(names),
    )
