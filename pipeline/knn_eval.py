"""Stage 3: neighbours in the codes of the train split vote for the tags of another split."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from .. import InputError
from ..cache import Store
from ..heads.config import KnnConfig, Metric
from ..heads.knn import Index, build_index
from ..heads.voting import vote
from .codes import Codes, read_codes
from .config import Config
from .evaluation import classifier_row, metrics_row, write_scores
from .metrics_file import merge_rows, read_metrics, write_metrics
from .progress import Progress
from .runs import Run, newest_run, open_run
from .tables import metrics_table

SINGLE_QUERIES = 200
WARM_UP = 20
SHOWN = ("split", "bits", "K", "distance_metric", "voting_strategy", "tau")


@dataclass(frozen=True, kw_only=True)
class KnnResult:
    """The run that was evaluated, where its metrics went, and the row of the neighbours."""

    run: Run
    metrics_path: Path
    metrics: dict[str, Any]
    others: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object."""
        return {"run": str(self.run.folder), "metrics_path": str(self.metrics_path), **self.metrics}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        settings = ", ".join(f"{name} {self.metrics[name]}" for name in SHOWN)
        return [metrics_table([self.metrics, *self.others], settings), f"wrote {self.metrics_path}"]


def find_run(run: Path | None, runs: Path = Path("runs"), *, store: Path | None = None) -> Run:
    """The run that was named, or the newest finished one of ``train-head``.

    Args:
        run: The run; the newest below ``runs`` when not given.
        runs: The folder of all runs.
        store: Where given, the run must come from the data set of this store.

    Raises:
        InputError: There is none, or it comes from another data set.
    """
    found = open_run(run) if run is not None else newest_run(runs)
    if store is not None:
        wanted = Store.open(store).key.manifest_sha256
        if found.info.manifest_sha256 != wanted:
            raise InputError(
                "a run of another data set", where=found.folder, got=f"manifest {found.info.manifest_sha256[:12]}",
                wanted=f"manifest {wanted[:12]}, as in {store}", do="name another --run, or train from this store",
            )  # fmt: skip
    return found


def knn_eval(config: Config, *, run: Run, split: str = "test", progress: Progress | None = None) -> KnnResult:
    """Search, vote and measure from the codes of a run; towers and store are not read.

    Args:
        config: The knn section is used.
        run: A finished run of ``train-head``.
        split: Whose images are tagged; an image never votes for itself.
        progress: Who to tell.

    Raises:
        InputError: Damaged codes or metrics, Hamming distance asked of a run without hash layer, or K larger than the
            index.
    """
    progress = progress or Progress()
    known = read_metrics(run.folder)
    base, val = read_codes(run.folder, "train"), read_codes(run.folder, "val")
    query = {"train": base, "val": val}.get(split) or read_codes(run.folder, split)
    knn = config.knn.model_copy(update={"distance_metric": _metric(config.knn, base, run)})
    _check_size(base, query, split, knn, run)
    progress.say(f"searching {len(query):,} {split} images among {len(base):,} train codes of {run.folder}")
    started = time.perf_counter()
    index = build_index(knn.distance_metric, packed=base.packed, soft=base.soft)
    build_s = time.perf_counter() - started
    tag = _Tagger(index, base, knn)
    scores, seconds = _timed(tag, query)
    tuned_on = None if split == "val" else (tag(val), val.labels)
    row = metrics_row("knn", split, scores, query.labels, tuned_on=tuned_on)
    row |= _settings(knn, base) | {"index_build_s": build_s, "throughput_qps": len(query) / seconds}
    row |= _latency(tag, query) | _sizes(index, base)
    write_scores(run.folder, "knn", split, query.image_id, scores)
    rows = merge_rows(known, [row, *_other_rows(split, query, val)])
    path = write_metrics(run.folder, rows)
    others = tuple(other for other in rows[1:] if other["split"] == split)
    return KnnResult(run=run, metrics_path=path, metrics=row, others=others)


class _Tagger:
    """Search and vote; leaves out the query's own image."""

    def __init__(self, index: Index, base: Codes, knn: KnnConfig) -> None:
        self._index, self._base, self._knn = index, base, knn
        self._order = np.argsort(base.image_id)

    def __call__(self, query: Codes, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        packed = None if query.packed is None else query.packed[rows]
        own = self._own_rows(query.image_id[rows])
        found = self._index.search(packed=packed, soft=query.soft[rows], K=self._knn.K, exclude=own)
        return vote(found, self._base.labels, self._knn)

    def _own_rows(self, image_id: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Row of each query's own image in the index, -1 where it is not there."""
        at = np.searchsorted(self._base.image_id, image_id, sorter=self._order)
        candidate = self._order[np.minimum(at, len(self._order) - 1)]
        own = np.where(self._base.image_id[candidate] == image_id, candidate, -1)
        return own if (own >= 0).any() else None


def _metric(knn: KnnConfig, base: Codes, run: Run) -> Metric:
    """Without a hash layer neighbours are found by cosine on z; Hamming asked for in so many words is refused."""
    if base.packed is not None or knn.distance_metric == "cosine":
        return knn.distance_metric
    if "distance_metric" in knn.model_fields_set:
        raise InputError(
            "no hash layer", where=run.folder, got=f"--metric {knn.distance_metric}", wanted="--metric cosine",
            do="train with --bits 64, or use --metric cosine",
        )  # fmt: skip
    return "cosine"


def _check_size(base: Codes, query: Codes, split: str, knn: KnnConfig, run: Run) -> None:
    usable = len(base) - (1 if query is base else 0)
    if not len(query):
        raise InputError(
            "an empty split", where=run.folder, got=f"no {split} images", wanted="some", do="choose --split"
        )
    if usable < knn.K:
        raise InputError(
            "K is larger than the index",
            where=run.folder,
            got=f"--k {knn.K}",
            wanted=f"at most {usable}",
            do="lower --k",
        )


def _timed(tag: Callable[[Codes], npt.NDArray[np.float32]], query: Codes) -> tuple[npt.NDArray[np.float32], float]:
    started = time.perf_counter()
    scores = tag(query)
    return scores, time.perf_counter() - started


def _settings(knn: KnnConfig, base: Codes) -> dict[str, Any]:
    bits = 0 if base.packed is None else 8 * base.packed.shape[1]
    settings = {
        "bits": bits, "K": knn.K, "distance_metric": knn.distance_metric, "voting_strategy": knn.voting_strategy,
        "tau": knn.tau, "theta": knn.theta, "n_index": len(base),
    }  # fmt: skip
    # tau acts on 1 - dist/B, so only tau * B says how many bits of distance matter.
    return settings | ({"tau_bits": knn.tau * bits} if knn.distance_metric == "hamming" else {})


def _latency(tag: _Tagger, query: Codes) -> dict[str, float]:
    """Search and vote of one query at a time, from its code to its scores."""
    rows = [row % len(query) for row in range(WARM_UP + SINGLE_QUERIES)]
    times = []
    for row in rows:
        started = time.perf_counter()
        tag(query, slice(row, row + 1))
        times.append(1e3 * (time.perf_counter() - started))
    kept = np.array(times[WARM_UP:])
    return {
        "query_latency_ms": float(kept.mean()),
        "query_latency_ms_p50": float(np.percentile(kept, 50)),
        "query_latency_ms_p95": float(np.percentile(kept, 95)),
    }


def _sizes(index: Index, base: Codes) -> dict[str, float]:
    """Bytes of the index, and of binary and float codes side by side."""
    sizes = {"index_bytes": float(index.n_bytes), "float_code_bytes": float(base.soft.nbytes)}
    if base.packed is not None:
        sizes |= {
            "binary_code_bytes": float(base.packed.nbytes),
            "float_over_binary_bytes": base.soft.nbytes / base.packed.nbytes,
        }
    return sizes


def _other_rows(split: str, query: Codes, val: Codes) -> list[dict[str, Any]]:
    """The classifier's row beside the neighbours', where logits were kept with the codes."""
    if query.logits is None or val.logits is None:
        return []
    return [classifier_row(split, query, val=val)]
