"""Run folders: made, described, finished, found again.

A run folder holds ``run.json`` (what it is and whether it is finished), ``config.yaml``, ``environment.json``,
``metrics.json`` and what its stage adds: ``history.jsonl``, ``checkpoints/``, ``codes/``, ``scores/``.
"""

import errno
import json
import math
import platform
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ... import __version__
from ...cache import Store
from ...cache.strict_json import parse_json
from ...errors import NOT_THERE, InputError, cannot_read, check_file
from .config import Config, dump_config
from .cores import count_cores
from .defaults import RUNS
from .files import check_name, command, write_text
from .metrics_file import write_metrics
from .run_folders import REPLACED, RunPaths, claim_named, claim_new

RUN_VERSION = 1
# In a run.json of before config.yaml was written: its text, so that a run that was killed then can begin again.
BEGUN_WITH = "begun_with"
# Runs with a head and codes: where one of train-head is asked for, any of them will do.
TRAINED = ("train-head", "finetune")
PACKAGES = ("torch", "transformers", "numpy", "h5py", "pyarrow", "faiss-cpu", "faiss-gpu", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The content of a run's ``run.json``.

    Attributes:
        kind: The command that made the run: ``train-head``, ``finetune`` or ``zero-shot``.
        status: ``running`` until everything is written, then ``finished``; ``interrupted`` or ``failed`` where it
            ended before that and could still say so.
        created: UTC, ISO 8601.
        config_digest: Digest of the resolved configuration.
        preset: Name of the preset.
        seed: The seed.
        store: The store that was read; of ``finetune`` the manifest.
        store_digest: Digest of its key; of ``finetune`` that of the store in float32 that the run's towers would fill.
        model: Checkpoint the store was made with.
        patches: Patch budget of the store.
        manifest_sha256: Content hash of the manifest.
        category_names: Names of the C classes.
        lists_digest: Digest of the protocol's lists as they were read; empty without.
        precision: What the model was computed in, ``float32``, ``bfloat16`` or ``float16``; empty in runs of a version
            that did not write it down.
    """

    kind: str
    status: str
    created: str
    config_digest: str
    preset: str
    seed: int
    store: str
    store_digest: str
    model: str
    patches: int
    manifest_sha256: str
    category_names: tuple[str, ...]
    lists_digest: str = ""
    precision: str = ""
    version: int = RUN_VERSION


_INFO = TypeAdapter(RunInfo)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder and what it says of itself."""

    folder: Path
    info: RunInfo

    @property
    def paths(self) -> RunPaths:
        """The paths of the files in the run's folder."""
        return RunPaths(self.folder)


def start_run(
    info: RunInfo,
    config: Config,
    *,
    label: str,
    out: Path | None,
    runs: Path,
    device: str,
    force: bool = False,
    locks: ExitStack | None = None,
) -> Run:
    """Make a run folder and write what is known before the work starts.

    Args:
        info: What the run is.
        config: The resolved configuration.
        label: Readable part of the folder's name.
        out: The folder; ``runs/<time>-<label>`` when not given.
        runs: The folder of all runs.
        device: Where it computes.
        force: Throw an existing run in ``out`` away first.
        locks: Keeps the run's lock, so that no other process can replace or resume the run until the stack is closed;
            when not given, the folder is held only while it is claimed.

    Raises:
        InputError: ``out`` holds something already and ``force`` is not given, is no run, or was taken by another
            process at the same moment; its name, or the store's, is not UTF-8.
    """
    for path in (out or runs, info.store):
        check_name(path)
    stamp, settings = datetime.now(UTC).strftime("%Y%m%d-%H%M%S"), dump_config(config)
    record = json.dumps({**asdict(info), BEGUN_WITH: settings}, indent=1)
    with ExitStack() as claim:
        folder = (
            claim_new(runs / f"{stamp}-{label}", record, locks or claim)
            if out is None
            else claim_named(out, record, locks or claim, force=force)
        )
    run = Run(folder=folder, info=info)
    write_text(run.paths.config, settings)
    write_text(run.paths.environment, json.dumps(environment(device, info.seed), indent=1))
    write_info(run)
    return run


def begun_config(folder: Path, *, kind: str = "train-head") -> Path:
    """The file of the configuration that an interrupted run is resumed with; ``kind`` is as for :func:`read_info`.

    Raises:
        InputError: No run, or one that was interrupted before it said how it was configured.
    """
    path, mark_path = RunPaths(folder).config, RunPaths(folder).mark
    if path.is_file() and not mark_path.exists():
        return path  # whoever needs a run says that there is none
    if mark_path.is_file() and mark_path.stat().st_size == 0:
        raise _not_resumable(folder, "a run that was interrupted as it began")
    info = read_info(folder, kind=kind)
    if info.status == REPLACED:
        raise _not_resumable(folder, "a run that was being replaced when it was interrupted")
    if not path.is_file():
        settings = parse_json(mark_path.read_bytes()).get(BEGUN_WITH)
        if not isinstance(settings, str):
            raise _not_resumable(folder, f"a run without {path.name}")
        write_text(path, settings)
    return path


def _not_resumable(folder: Path, got: str) -> InputError:
    do = "give the command that began it again, with --force"
    return InputError("cannot resume this run", where=folder, got=got, do=do)


def finish_run(run: Run, rows: Sequence[Mapping[str, Any]]) -> Run:
    """Write the metrics, then mark the run as finished: the mark is written last."""
    write_metrics(run.folder, rows)
    return mark(run, "finished")


def open_run(folder: Path, *, kind: str = "train-head") -> Run:
    """Read a finished run; where one of ``train-head`` is asked for, one of ``finetune`` is as good.

    Raises:
        InputError: No such folder, no run, an unfinished run, or a run of another kind.
    """
    info = read_info(folder, kind=kind)
    if (got := _why_unusable(info, kind)) is not None:
        is_begun = info.kind in TRAINED and info.status in {"running", "interrupted"}
        do = f"finish it with `{command(info.kind, '--resume', folder)}`" if is_begun else f"run `mmcli {kind}`"
        raise InputError(
            "cannot use this run",
            where=folder,
            got=got,
            wanted=f"a finished run of {kind}, version {RUN_VERSION}",
            do=f"{do}, or name another run",
        )
    return Run(folder=folder, info=info)


def _why_unusable(info: RunInfo, kind: str) -> str | None:
    """What a run is where it is not a finished one of a kind; None where it is."""
    kinds = TRAINED if kind in TRAINED else (kind,)
    if info.kind in kinds and info.status == "finished" and info.version == RUN_VERSION:
        return None
    return f"a run of {info.kind}, {info.status}, version {info.version}"


def read_info(folder: Path, *, kind: str = "train-head") -> RunInfo:
    """What ``run.json`` of a run says, finished or not; ``kind`` is the command that makes such a run, for messages.

    Raises:
        InputError: No such folder, or no run.
    """
    path = RunPaths(folder).mark
    try:
        if path.exists():
            check_file(path, "cannot read a run", wanted="what mmcli wrote")
        record = parse_json(path.read_bytes())
        record.pop(BEGUN_WITH, None)
        unknown = record.keys() - {field.name for field in fields(RunInfo)}
        if unknown:
            raise ValueError(f"the key {min(unknown)!r:.60}")
        info = _INFO.validate_json(json.dumps(record), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        got = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError("broken run", where=path, got=got, wanted="what mmcli wrote", do="train again") from None
    except InputError:
        raise
    except OSError as error:
        if error.errno not in NOT_THERE | {errno.EISDIR}:
            raise cannot_read("cannot read a run", path, error) from None
        raise InputError(
            "no run",
            where=folder,
            got="no run.json",
            wanted="a run folder",
            do=f"name a run of `mmcli {kind}`, or make one first",
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError("broken run", where=path, got=error, wanted="what mmcli wrote", do="train again") from None
    return info


def run_identity(folder: Path) -> dict[str, str]:
    """What the files of a run say to belong to it: when the run was made; nothing where no ``run.json`` says so."""
    try:
        return {"run": read_info(folder).created}
    except InputError:
        return {}


def newest_run(runs: Path, *, kind: str = "train-head") -> Run:
    """The finished run of one kind that was made last, as :func:`open_run` takes it.

    Raises:
        InputError: There is none, or a run that may be newer cannot be read.
    """
    usable: list[Run] = []
    unreadable: list[tuple[float, InputError]] = []
    for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
        try:
            info = read_info(folder, kind=kind)
        except InputError as error:
            if (changed := _change_time(RunPaths(folder).mark)) is not None:
                unreadable.append((changed, error))
        else:
            if _why_unusable(info, kind) is None:
                usable.append(Run(folder=folder, info=info))
    newest = max(usable, key=lambda run: run.info.created, default=None)
    created = 0.0 if newest is None else datetime.fromisoformat(newest.info.created).timestamp()
    for changed, problem in unreadable:
        if changed > created:  # the file is written again when its run ends, so an older time means an older run
            raise InputError(
                "cannot read a run that may be the newest",
                where=problem.where,
                got=problem.got,
                wanted=problem.wanted,
                do="mend or remove it, or name a run with --run",
            ) from None
    if newest is None:
        raise InputError(
            "no run",
            where=runs,
            got=f"no finished run of {kind}",
            wanted="at least one",
            do=f"run `mmcli {kind}` first, or name a run elsewhere with --run",
        )
    return newest


def find_run(run: Path | None, runs: Path = RUNS, *, store: Path | None = None) -> Run:
    """The run that was named, or the newest finished one of ``train-head``.

    Args:
        run: The run; the newest below ``runs`` when not given.
        runs: The folder of all runs.
        store: Where given, the run must come from the data set of this store.

    Raises:
        InputError: There is none, or it comes from another data set.
    """
    chosen = open_run(run) if run is not None else newest_run(runs)
    if store is not None:
        wanted = Store.open(store).key.manifest_sha256
        if chosen.info.manifest_sha256 != wanted:
            raise InputError(
                "a run of another data set",
                where=chosen.folder,
                got=f"manifest {chosen.info.manifest_sha256[:12]}",
                wanted=f"manifest {wanted[:12]}, as in {store}",
                do="name another --run, or train from this store",
            )
    return chosen


def _change_time(path: Path) -> float | None:
    """When a mark was written last; None where there is none, or an empty one of a run that was killed as it began."""
    try:
        status = path.lstat()
    except OSError as error:
        return None if error.errno in NOT_THERE else math.inf
    return None if stat.S_ISREG(status.st_mode) and not status.st_size else status.st_mtime


def now() -> str:
    """This moment in UTC, ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def environment(device: str, seed: int) -> dict[str, Any]:
    """Versions, device, seed and git state, for whoever reads the run later."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "mmcli": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": count_cores(),
        "device": device,
        "seed": seed,
        "packages": versions,
        "git": _git_state(),
        "command": sys.argv,
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of this code and whether it has changes; nothing where git does not know it, or there is no git."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # installed code may lie in somebody else's clone
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    done = subprocess.run(  # noqa: S603
        ["git", *words],  # noqa: S607
        cwd=Path(__file__).parent,
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # git writes the names of files as they are
        check=True,
        timeout=5,
    )
    return done.stdout.strip()


def mark(run: Run, status: str) -> Run:
    """Say in ``run.json`` how a run stands: ``running``, ``interrupted``, ``failed`` or ``finished``."""
    marked = replace(run, info=replace(run.info, status=status))
    write_info(marked)
    return marked


def write_info(run: Run) -> None:
    """Write what a run says of itself to its ``run.json``."""
    write_text(run.paths.mark, json.dumps(asdict(run.info), indent=1))
