"""What a report reads: run folders, the rows of the experiments, and the data set's captions and pictures.

A folder that is no finished run is left out and counted; nothing here computes anything.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ...cache.strict_json import parse_json
from ...errors import InputError
from ...heads.config import KnnConfig
from ...heads.metrics import tune_thresholds
from ...heads.ranking import average_precision
from ..ablation.experiments import DEFAULT, read_experiments
from ..ablation.records import ROWS, read_rows
from ..core.config import load_config
from ..core.files import command
from ..core.metrics_file import METRICS, by_precision, read_history, read_metrics
from ..core.results import Codes, codes_path, read_codes
from ..core.run import TRAINED, Run, read_info
from ..core.run_folders import MARK
from ..data.manifest import Manifest, read_manifest
from ..evaluation.compare import Arm, Sample
from ..evaluation.metrics import scores_path
from ..evaluation.search import Evaluated, NeighbourSearch
from .document import Pictures

SPLIT = "test"
DEFAULT_DATA, DEFAULT_ABLATIONS = Path("data/coco"), Path("runs/ablations")
SETTINGS = ("--set", "--config")
DEFAULT_PRESET, DEFAULT_CACHE, MINIATURE = "recommended", Path("data/cache"), "miniature"


@dataclass(frozen=True, kw_only=True)
class Known:
    """A finished run: its rows of test, its history by epoch, its environment and its configuration as text."""

    run: Run
    rows: tuple[Mapping[str, Any], ...]
    history: tuple[Mapping[str, Any], ...]
    environment: Mapping[str, Any]
    config: str

    @property
    def best_val(self) -> float:
        """The highest val mAP of its training; -1 where it was not trained."""
        return max((float(line["val_mAP"]) for line in self.history if line.get("val_mAP") is not None), default=-1.0)

    @property
    def is_control(self) -> bool:
        """Whether its magnitudes were shuffled on purpose."""
        return "magnitude: shuffled" in self.config


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All of it.

    Attributes:
        runs: Finished runs by name, those below ``runs`` first.
        own: How many of them lie below ``runs`` itself.
        rows: Of the experiments; none where no experiment was made.
        ablations: The folder that their paths are relative to.
        pictures: Of the data set, empty where there is none.
        listing: Its manifest.
        n_unfinished: Folders that hold a run that is not finished.
    """

    runs: Mapping[str, Known]
    own: int
    rows: tuple[Mapping[str, Any], ...]
    ablations: Path
    pictures: Pictures
    listing: Manifest | None
    n_unfinished: int

    def ablate(self, *experiments: str, seeds: int = 3) -> str:
        """The command that makes experiments from the store and the preset of the runs that are there."""
        words = ["mmcli", "ablate", *experiments, "--seeds", str(seeds)]
        info = next((known.run.info for known in self.runs.values() if known.run.info.kind in TRAINED), None)
        if info is not None and info.kind == "train-head" and Path(info.store).parent != DEFAULT_CACHE:
            words += ["--store", _shown(Path(info.store))]
        if info is not None and info.preset != DEFAULT_PRESET:
            words += ["--preset", info.preset]
        words += next((found for known in self.runs.values() if (found := _settings_of(known.environment))), [])
        if _of_the_miniature(self.rows, experiments):
            words += ["--experiments", MINIATURE]
        if self.ablations != DEFAULT_ABLATIONS:
            words += ["--out", _shown(self.ablations)]
        return shlex.join(words)

    def arms(self, experiment: str) -> list[Arm]:
        """The values of an experiment in their order, with the seeds that have figures."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for row in sorted(self.rows, key=lambda row: (row["order"], row["seed"])):
            if row["experiment"] == experiment:
                found.setdefault(row["value"], []).append(row)
        return [
            self._arm(value, own, precision)
            for value, rows in found.items()
            for precision, own in by_precision(rows).items()
        ]

    def _arm(self, value: str, rows: list[Mapping[str, Any]], precision: str) -> Arm:
        notes = dict.fromkeys(row["note"] for row in rows if row.get("note"))
        found = [row for row in rows if row["status"] != "failed" and row.get("mAP") is not None]
        # What no seed changes, as zero-shot, is one evaluation under several seeds.
        done = list({row["key"]: row for row in reversed(found)}.values())[::-1]
        samples = tuple(
            Sample(
                seed=row["seed"],
                row=row,
                scores=self.ablations / row["scores"] if row.get("scores") else None,
            )
            for row in done
        )
        return Arm(value=value, precision=precision, samples=samples, note="; ".join(notes))


def read_inputs(runs: Path, ablations: Path, data: Path | None) -> Inputs:
    """Find and read.

    Args:
        runs: Folder of the runs.
        ablations: Folder of the experiments' table.
        data: The data set's folder; the default place when not given, where it is there.

    Raises:
        InputError: Neither runs nor experiments, or a data folder that was named and has no manifest.
    """
    found, unfinished = _runs(runs)
    own = len(found)
    extra, more = _runs(ablations / "runs")
    found |= {name: known for name, known in extra.items() if name not in found}
    rows = read_rows(ablations)
    if not found and not rows:
        raise InputError(
            "nothing to report",
            where=runs,
            got=f"no finished run, and no {ROWS} in {ablations}",
            wanted="at least one",
            do="run `mmcli train-head` and `mmcli knn-eval` first, or name --runs",
        )
    listing = _listing(data)
    pictures = Pictures(DEFAULT_DATA if data is None else data, listing)
    return Inputs(
        runs=found,
        own=own,
        rows=tuple(rows),
        ablations=ablations,
        pictures=pictures,
        listing=listing,
        n_unfinished=unfinished + more,
    )


def arm_of(known: Known, row: Mapping[str, Any], name: str) -> Arm:
    """A method of a run folder as an arm of one seed."""
    folder = known.run.folder
    labels = codes_path(folder, SPLIT)
    scores = scores_path(folder, str(row["method"]), SPLIT)
    sample = Sample(seed=known.run.info.seed, row=row, scores=scores, labels=labels if labels.is_file() else None)
    return Arm(value=name, samples=(sample,))


def has_codes(known: Known) -> bool:
    """Whether neighbours can be found in what a run keeps."""
    voters = any(codes_path(known.run.folder, split).is_file() for split in ("database", "train"))
    return known.run.info.kind in TRAINED and voters and codes_path(known.run.folder, SPLIT).is_file()


def read_known(folder: Path) -> Known:
    """A run folder.

    Raises:
        InputError: No run, not a finished one, or damaged metrics.
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
    rows = tuple(row for row in read_metrics(folder) if row["split"] == SPLIT)
    return Known(
        run=Run(folder=folder, info=info),
        rows=rows,
        history=tuple(read_history(folder)),
        environment=_environment(folder),
        config=_text(folder / "config.yaml"),
    )


def _runs(folder: Path) -> tuple[dict[str, Known], int]:
    """Finished runs of a folder by name, and how many others there are."""
    found, others = {}, 0
    for path in sorted(folder.glob(f"*/{MARK}")):
        try:
            found[path.parent.name] = read_known(path.parent)
        except InputError:
            others += 1
    return found, others


def _listing(data: Path | None) -> Manifest | None:
    path = (DEFAULT_DATA if data is None else data) / "manifest.parquet"
    return None if data is None and not path.is_file() else read_manifest(path)


def _of_the_miniature(rows: tuple[Mapping[str, Any], ...], experiments: tuple[str, ...]) -> bool:
    """Whether rows of these experiments have values that only the miniature's file has."""
    made = {(row["experiment"], row["value"]) for row in rows if row["experiment"] in experiments}
    return bool(made) and bool(made & (_values(MINIATURE) - _values(DEFAULT)))


@cache
def _values(file: str) -> frozenset[tuple[str, str]]:
    """Experiments and values of a file that is shipped."""
    return frozenset((name, choice.value) for name, one in read_experiments(file).items() for choice in one.choices)


def _settings_of(environment: Mapping[str, Any]) -> list[str]:
    """Settings that a run's own `mmcli ablate` was given, which the next one needs to be of the same base."""
    words = environment.get("command")
    if not isinstance(words, list) or words[1:2] != ["ablate"]:
        return []
    pairs = pairwise(words)
    return [str(word) for flag, value in pairs if flag in SETTINGS for word in (flag, value)]


def _shown(path: Path) -> str:
    """A path as a person in this folder would type it."""
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def _environment(folder: Path) -> dict[str, Any]:
    try:
        found = parse_json((folder / "environment.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


NEIGHBOURS_SHOWN = 9  # neighbours of a query
BASE = ("base", "full")
OF_ROW = ("K", "distance_metric", "voting_strategy", "tau", "theta", "ties")


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What is known of the test images of one run.

    Attributes:
        known: The run.
        why: Why this one.
        knn: How its neighbours were found and how they vote.
        base: The codes that vote.
        query: The test images' codes.
        neighbours: Rows of ``base`` ``(Q, K)``, the nearest first.
        distance: Their distances ``(Q, K)``.
        weight: Their shares of the vote ``(Q, K)``.
        scores: Votes ``(Q, C)``.
        threshold: Best on val for micro F1; None where no val image has a label.
        classifier: Probabilities ``(Q, C)``; None where none were kept.
        classifier_threshold: Likewise of the classifier.
        AP: Of every image, of the votes ``(Q,)``; NaN without a label.
    """

    known: Known
    why: str
    knn: KnnConfig
    base: Codes
    query: Codes
    neighbours: npt.NDArray[np.int64]
    distance: npt.NDArray[Any]
    weight: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float32]
    threshold: float | None
    classifier: npt.NDArray[np.float64] | None
    classifier_threshold: float | None
    AP: npt.NDArray[np.float64]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the categories."""
        return self.known.run.info.category_names

    @property
    def at(self) -> float:
        """Where a vote predicts a tag."""
        return 0.5 if self.threshold is None else self.threshold


def choose(inputs: Inputs, folder: Path | None) -> tuple[Known, str] | None:
    """The run to look into: the one that was named, else the one of the highest val mAP that is the method itself.

    That is: below ``runs`` itself, or of the full method among the base methods. Runs of other experiments are controls
    and variants; one of them is taken where there is nothing else. Val decides, because test tunes and chooses nothing,
    and runs with hash codes go first.

    Raises:
        InputError: The named run is none, is not finished, or keeps no codes.
    """
    if folder is not None:
        known = read_known(folder)
        if not has_codes(known):
            raise InputError(
                "no codes to look into",
                where=folder,
                got=f"a run of {known.run.info.kind}",
                wanted="one of train-head or finetune with its codes",
                do="name another --run",
            )
        return known, "named with --run"
    full = {Path(str(row["run"])).name for row in inputs.rows if (row["experiment"], row["value"]) == BASE}
    own = [known for at, (name, known) in enumerate(inputs.runs.items()) if at < inputs.own or name in full]
    method = [known for known in own if not known.is_control]
    return _best(method, "made by hand or of the full method") or _best(list(inputs.runs.values()), "of any experiment")


def _best(among: list[Known], which: str) -> tuple[Known, str] | None:
    """The run of the highest val mAP and the reason in words; None where none keeps codes."""
    found = [known for known in among if has_codes(known)]
    if not found:
        return None
    hashed = [known for known in found if _bits(known)]
    best, n = max(hashed or found, key=lambda known: known.best_val), len(hashed or found)
    value = "no val mAP is kept" if best.best_val < 0 else f"the highest val mAP, {best.best_val:.3f}"
    return best, f"{value}, of {n} run{'' if n == 1 else 's'} with {'hash codes' if hashed else 'codes'}, {which}"


def look_into(known: Known, why: str) -> Depth:
    """Search and vote as the run's own evaluation did, or as its configuration says where there was none."""
    found = Evaluated.of(known.run, SPLIT)
    knn = _settings(known)
    metric = "cosine" if found.base.packed is None else knn.distance_metric
    ties = knn.ties if metric == "hamming" else "index"
    usable = max(1, len(found.base) - 1)  # a query that is in the index itself is left out
    update = {"distance_metric": metric, "ties": ties, "K": min(knn.K, usable), "index": "auto"}
    knn = knn.model_copy(update=update)
    search = NeighbourSearch(found, [knn])
    scores, on_val, _ = search.vote(knn)
    labelled = bool(found.val.labels.any())
    probabilities, val_probabilities = found.query.probabilities, found.val.probabilities
    return Depth(
        known=known,
        why=why,
        knn=knn,
        base=found.base,
        query=found.query,
        neighbours=search.nearest.neighbours.index,
        distance=search.nearest.neighbours.distance,
        weight=search.weights(knn),
        scores=scores,
        threshold=tune_thresholds(on_val, found.val.labels).overall if labelled else None,
        classifier=probabilities,
        classifier_threshold=(
            tune_thresholds(val_probabilities, found.val.labels).overall
            if labelled and val_probabilities is not None
            else None
        ),
        AP=average_precision(scores.T, found.query.labels.T.astype(bool)),
    )


def _settings(known: Known) -> KnnConfig:
    base = load_config(known.run.folder / "config.yaml").knn
    rows = [row for row in known.rows if row["method"] == "knn"]
    row: Mapping[str, Any] = rows[0] if rows else {}
    settings = {key: row[key] for key in OF_ROW if row.get(key) is not None}
    try:
        return KnnConfig(**{**base.model_dump(), **settings})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            "damaged metrics",
            where=known.run.folder / METRICS,
            got=f"{first['loc'][0]} {first['input']!r:.60}",
            wanted="what mmcli wrote",
            do="remove the file, and `mmcli knn-eval` writes it again",
        ) from None


def _bits(known: Known) -> bool:
    return read_codes(known.run.folder, SPLIT).packed is not None
