"""The first pass of a report, collect: read run folders, rows of experiments, codes, captions and pictures.

A folder that holds no finished run is left out and counted. What is read here is compared in :mod:`.answers`,
:mod:`.tables`, :mod:`.analysis` and :mod:`.figures`, which open no files of their own; only scores are read when two
are compared, each file once (:class:`~mmcli.pipeline.evaluation.compare.Pairs`).
"""

import base64
import io
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from ...cache.strict_json import parse_json
from ...errors import InputError, read_text
from ...heads.config import KnnConfig
from ..ablation.experiments import DEFAULT, read_experiments
from ..ablation.records import ROWS, read_rows
from ..core.config import load_config
from ..core.defaults import ABLATIONS, DATA, STORES
from ..core.files import command, resolve_image
from ..core.metrics_file import by_precision, read_history, read_metrics
from ..core.results import read_codes
from ..core.run import TRAINED, Run, RunInfo, read_info
from ..core.run_folders import MARK, RunPaths
from ..data.manifest import Manifest, read_manifest
from ..evaluation.compare import Arm, Sample
from ..evaluation.search import Evaluated
from ..extraction.images import UnreadableImage, open_rgb

Row = Mapping[str, Any]

SPLIT = "test"
DEFAULT_PRESET, MINIATURE = "recommended", "miniature"
ABLATE_SETTINGS = ("--set", "--config")
FULL_METHOD = ("base", "full")
VOTE_KEYS = ("K", "distance_metric", "voting_strategy", "tau", "theta", "ties")
QUALITY = 72


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small picture: the bytes of a WebP file, its size in pixels, and a name for the file."""

    webp: bytes = field(repr=False)
    width: int
    height: int
    file: str

    @cached_property
    def uri(self) -> str:
        """The picture itself as an address."""
        return "data:image/webp;base64," + base64.b64encode(self.webp).decode("ascii")


class Pictures:
    """Pictures and captions by image id, read when they are asked for.

    Args:
        data: The data folder.
        manifest: Its manifest; without one there is no picture and no caption.
    """

    def __init__(self, data: Path = DATA, manifest: Manifest | None = None) -> None:
        self._data, self._manifest = data, manifest
        ids = [] if manifest is None else manifest.image_ids.tolist()
        self._row = {image_id: row for row, image_id in enumerate(ids)}
        self._pictures: dict[tuple[int, int], Picture | None] = {}

    def __bool__(self) -> bool:
        return self._manifest is not None

    @property
    def shown(self) -> list[Picture]:
        """All pictures that were asked for and could be read."""
        return [picture for picture in self._pictures.values() if picture is not None]

    def caption(self, image_id: int) -> str:
        """The first caption, by which val and test are tagged; empty for an unknown image."""
        row = self._row.get(image_id)
        return "" if row is None or self._manifest is None else self._manifest.first_captions[row]

    def picture(self, image_id: int, side: int) -> Picture | None:
        """The picture, its longer side at most ``side`` pixels; None where it cannot be read."""
        if (image_id, side) not in self._pictures:
            self._pictures[image_id, side] = self._read(image_id, side)
        return self._pictures[image_id, side]

    def _read(self, image_id: int, side: int) -> Picture | None:
        row = self._row.get(image_id)
        if row is None or self._manifest is None:
            return None
        try:
            image = open_rgb(resolve_image(self._data, self._manifest.paths[row]))
        except (InputError, UnreadableImage):
            return None
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=QUALITY)
        return Picture(webp=stream.getvalue(), width=image.width, height=image.height, file=f"{image_id}-{side}.webp")


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run: its rows of test, its history by epoch, its environment and its configuration as text."""

    folder: Path
    info: RunInfo
    rows: tuple[Row, ...]
    history: tuple[Row, ...]
    environment: Row
    config: str

    @property
    def best_val(self) -> float:
        """The highest val mAP of its training; -1 where it was not trained."""
        return max((float(line["val_mAP"]) for line in self.history if line.get("val_mAP") is not None), default=-1.0)

    @property
    def is_control(self) -> bool:
        """Whether its magnitudes were shuffled on purpose."""
        return "magnitude: shuffled" in self.config

    @property
    def has_codes(self) -> bool:
        """Whether it keeps codes in which neighbours can be searched."""
        voters = any(RunPaths(self.folder).codes(split).is_file() for split in ("database", "train"))
        return self.info.kind in TRAINED and voters and RunPaths(self.folder).codes(SPLIT).is_file()

    def arm(self, row: Row, name: str) -> Arm:
        """One method of the run as an arm of one seed."""
        labels = RunPaths(self.folder).codes(SPLIT)
        sample = Sample(
            seed=self.info.seed,
            row=row,
            scores=RunPaths(self.folder).scores(str(row["method"]), SPLIT),
            labels=labels if labels.is_file() else None,
        )
        return Arm(value=name, samples=(sample,))


@dataclass(frozen=True, kw_only=True)
class ChosenRun:
    """The run whose images, bits and classes are shown: why it was chosen, its codes, and how its neighbours vote."""

    finished: FinishedRun
    reason: str
    codes: Evaluated
    knn: KnnConfig


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a report reads.

    Attributes:
        runs: Finished runs by name, those below ``--runs`` itself first.
        n_by_hand: How many of them lie below ``--runs`` itself; the others were made by experiments.
        rows: Rows of the experiments; empty where no experiment was run.
        titles: Titles of the experiments by name.
        ablations: The folder that the paths in the rows are relative to.
        manifest: The manifest of the data set; None where there is none.
        pictures: Pictures and captions of the data set.
        n_unfinished: Number of folders that hold an unfinished or damaged run.
    """

    runs: Mapping[str, FinishedRun]
    n_by_hand: int
    rows: tuple[Row, ...]
    titles: Mapping[str, str]
    ablations: Path
    manifest: Manifest | None
    pictures: Pictures
    n_unfinished: int

    @property
    def experiments(self) -> list[str]:
        """Names of the experiments that have rows, in order."""
        return list(dict.fromkeys(row["experiment"] for row in self.rows))

    def rows_of(self, experiment: str) -> list[Row]:
        """The rows of one experiment, by value and seed."""
        rows = (row for row in self.rows if row["experiment"] == experiment)
        return sorted(rows, key=lambda row: (row["order"], row["seed"]))

    def arms(self, experiment: str) -> list[Arm]:
        """The values of an experiment in their order, with the seeds that have metrics."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows_of(experiment):
            groups.setdefault(row["value"], []).append(row)
        return [
            self._arm(value, seeds, precision)
            for value, rows in groups.items()
            for precision, seeds in by_precision(rows).items()
        ]

    def _arm(self, value: str, rows: list[Row], precision: str) -> Arm:
        notes = dict.fromkeys(row["note"] for row in rows if row.get("note"))
        measured = [row for row in rows if row["status"] != "failed" and row.get("mAP") is not None]
        # What no seed changes, as zero-shot, is one evaluation under several seeds.
        distinct = list({row["key"]: row for row in reversed(measured)}.values())[::-1]
        samples = tuple(
            Sample(seed=row["seed"], row=row, scores=self.ablations / row["scores"] if row.get("scores") else None)
            for row in distinct
        )
        return Arm(value=value, precision=precision, samples=samples, note="; ".join(notes))

    def ablate(self, *experiments: str, seeds: int = 3) -> str:
        """The command that runs experiments with the store, the preset and the settings of the runs that exist."""
        words = ["mmcli", "ablate", *experiments, "--seeds", str(seeds)]
        info = next((run.info for run in self.runs.values() if run.info.kind in TRAINED), None)
        if info is not None and info.kind == "train-head" and Path(info.store).parent != STORES:
            words += ["--store", _relative(Path(info.store))]
        if info is not None and info.preset != DEFAULT_PRESET:
            words += ["--preset", info.preset]
        words += next((words for run in self.runs.values() if (words := _ablate_settings(run.environment))), [])
        pairs = {(row["experiment"], row["value"]) for row in self.rows if row["experiment"] in experiments}
        if pairs and pairs & (_shipped_values(MINIATURE) - _shipped_values(DEFAULT)):
            words += ["--experiments", MINIATURE]
        if self.ablations != ABLATIONS:
            words += ["--out", _relative(self.ablations)]
        return shlex.join(words)


def collect(runs: Path, ablations: Path, data: Path | None) -> Inputs:
    """Read all runs and rows, and the manifest.

    Args:
        runs: Folder of the runs.
        ablations: Folder of the experiments' table.
        data: The data set's folder; when not given, the default place if there is a manifest.

    Raises:
        InputError: Neither runs nor experiments, or a data folder that was named and has no manifest.
    """
    by_hand, n_unfinished = _finished_runs(runs)
    of_experiments, n_more = _finished_runs(ablations / "runs")
    rows = read_rows(ablations)
    if not by_hand and not of_experiments and not rows:
        raise InputError(
            "nothing to report",
            where=runs,
            got=f"no finished run, and no {ROWS} in {ablations}",
            wanted="at least one",
            do="run `mmcli train-head` and `mmcli knn-eval` first, or name --runs",
        )
    folder = DATA if data is None else data
    path = folder / "manifest.parquet"
    manifest = None if data is None and not path.is_file() else read_manifest(path)
    return Inputs(
        runs=by_hand | {name: run for name, run in of_experiments.items() if name not in by_hand},
        n_by_hand=len(by_hand),
        rows=tuple(rows),
        titles={name: experiment.title for name, experiment in read_experiments().items()} if rows else {},
        ablations=ablations,
        manifest=manifest,
        pictures=Pictures(folder, manifest),
        n_unfinished=n_unfinished + n_more,
    )


def read_finished_run(folder: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        InputError: It holds no run, one that is not finished, or damaged metrics.
    """
    info = read_info(folder)
    if info.status != "finished":
        raise InputError(
            "cannot report this run",
            where=folder,
            got=f"a run that is {info.status}",
            wanted="a finished run",
            do=f"finish it with `{command(info.kind, '--resume', folder)}`, or name another --run",
        )
    try:
        environment = parse_json(_text(RunPaths(folder).environment))
    except ValueError:
        environment = None
    return FinishedRun(
        folder=folder,
        info=info,
        rows=tuple(row for row in read_metrics(folder) if row["split"] == SPLIT),
        history=tuple(read_history(folder)),
        environment=environment if isinstance(environment, dict) else {},
        config=_text(RunPaths(folder).config),
    )


def choose_run(inputs: Inputs, folder: Path | None) -> ChosenRun | None:
    """Choose the run to look into and read its codes.

    It is the run that was named, else the one with the highest val mAP among those made by hand and those of the full
    method in the base experiment, without shuffled magnitudes; where there is none, among all. Val decides because
    test must not choose anything, and runs with hash codes go first.

    Returns:
        None where no run keeps codes.

    Raises:
        InputError: The named run is none, is not finished, or keeps no codes.
    """
    if folder is not None:
        run = read_finished_run(folder)
        if not run.has_codes:
            raise InputError(
                "no codes to look into",
                where=folder,
                got=f"a run of {run.info.kind}",
                wanted="one of train-head or finetune with its codes",
                do="name another --run",
            )
        return read_codes_of(run, "named with --run")
    full = {Path(str(row["run"])).name for row in inputs.rows if (row["experiment"], row["value"]) == FULL_METHOD}
    candidates = [run for i, (name, run) in enumerate(inputs.runs.items()) if i < inputs.n_by_hand or name in full]
    method = [run for run in candidates if not run.is_control]
    best = _best(method, "made by hand or of the full method") or _best(list(inputs.runs.values()), "of any experiment")
    return None if best is None else read_codes_of(*best)


def read_codes_of(run: FinishedRun, reason: str) -> ChosenRun:
    """Read the codes of a run, and how its own evaluation searched and voted, else what its configuration says.

    Raises:
        InputError: Damaged codes or metrics.
    """
    settings = next((row for row in run.rows if row["method"] == "knn"), {})
    config = load_config(RunPaths(run.folder).config).knn.model_dump()
    try:
        knn = KnnConfig(**config | {key: settings[key] for key in VOTE_KEYS if settings.get(key) is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            "damaged metrics",
            where=RunPaths(run.folder).metrics,
            got=f"{first['loc'][0]} {first['input']!r:.60}",
            wanted="what mmcli wrote",
            do="remove the file, and `mmcli knn-eval` writes it again",
        ) from None
    return ChosenRun(
        finished=run, reason=reason, codes=Evaluated.of(Run(folder=run.folder, info=run.info), SPLIT), knn=knn
    )


def _best(runs: list[FinishedRun], which: str) -> tuple[FinishedRun, str] | None:
    """The run with the highest val mAP and the reason in words; None where none keeps codes."""
    coded = [run for run in runs if run.has_codes]
    if not coded:
        return None
    hashed = [run for run in coded if read_codes(run.folder, SPLIT).packed is not None]
    best, n = max(hashed or coded, key=lambda run: run.best_val), len(hashed or coded)
    value = "no val mAP is kept" if best.best_val < 0 else f"the highest val mAP, {best.best_val:.3f}"
    return best, f"{value}, of {n} run{'' if n == 1 else 's'} with {'hash codes' if hashed else 'codes'}, {which}"


def _finished_runs(folder: Path) -> tuple[dict[str, FinishedRun], int]:
    """The finished runs below a folder by name, and how many other runs there are."""
    finished, n_others = {}, 0
    for path in sorted(folder.glob(f"*/{MARK}")):
        try:
            finished[path.parent.name] = read_finished_run(path.parent)
        except InputError:
            n_others += 1
    return finished, n_others


@cache
def _shipped_values(file: str) -> frozenset[tuple[str, str]]:
    """Names and values of the experiments in a file that is shipped."""
    experiments = read_experiments(file).items()
    return frozenset((name, choice.value) for name, experiment in experiments for choice in experiment.choices)


def _ablate_settings(environment: Row) -> list[str]:
    """The settings of the `mmcli ablate` that made a run, which the next one needs for the same base."""
    words = environment.get("command")
    if not isinstance(words, list) or words[1:2] != ["ablate"]:
        return []
    return [str(word) for flag, value in pairwise(words) if flag in ABLATE_SETTINGS for word in (flag, value)]


def _relative(path: Path) -> str:
    """A path as a person in this folder would type it."""
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def _text(path: Path) -> str:
    """The text of a file; empty where it cannot be read."""
    try:
        return read_text(path, "cannot read")
    except InputError:
        return ""
