"""``mmcli bench knn``: search and vote beside the plan's loop, scikit-learn and USearch; every index with its recall.

Symbols: N codes of the index, Q queries, K neighbours, B bits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from ...heads.config import IndexKind, KnnConfig
from ...heads.knn import build_hamming
from ...heads.neighbours import Index, Neighbours, Packed, Rows
from ...heads.voting import vote
from ..core.console import FittingTable
from ..core.progress import Progress
from .harness import BenchResult, Case, best_of
from .rivals import Search, loop, make_codes, make_labels, plain_index, sklearn_search, usearch_search
from .sizes import check_sizes

SINGLE, WARM_UP = 200, 20
MOST_QUERIES, PAIRS = 5000, 1 << 30  # so that a batch of a large index ends
LOOP_QUERIES = 500
LABELLED = 1_000_000  # labels of more rows are those of row % LABELLED: a vote costs the same
HNSW_MOST = 200_000
KINDS: tuple[IndexKind, ...] = ("auto", "flat", "ivf", "hnsw", "multihash")


@dataclass(frozen=True, kw_only=True)
class KnnBenchResult(BenchResult):
    """Cases, and one line for every index and rival."""

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        table = FittingTable(title="every index beside the exact one")
        for name in ("codes", "bits", "index", "queries/s", "p50 ms", "p95 ms", "build s", "MB", "recall"):
            table.add_column(name, justify="left" if name == "index" else "right")
        for row in self.facts["indexes"]:
            table.add_row(
                f"{row['n_codes']:,}", str(row["bits"]), row["index"], f"{row['queries_per_s']:,.0f}",
                f"{row['p50_ms']:.3f}", f"{row['p95_ms']:.3f}", _or_dash(row["build_s"], "{:.2f}"),
                _or_dash(row["n_bytes"], "{:,.1f}", 1e-6), f"{row['recall']:.4f}",
            )  # fmt: skip
        first, *rest = super().summary()
        return [first, table, *rest]


@dataclass(frozen=True, kw_only=True)
class _Size:
    """One size of index with its queries."""

    base: Packed
    queries: Packed
    labels: npt.NDArray[np.uint8]
    knn: KnnConfig
    repeats: int

    @property
    def name(self) -> str:
        return f"{len(self.base):,} codes of {8 * self.base.shape[1]} bits"

    def tag(self, index: Index, queries: Packed) -> npt.NDArray[np.float32]:
        """Search and vote."""
        found = index.search(packed=queries, K=self.knn.K)
        if len(self.base) > len(self.labels):
            found = Neighbours(found.index % len(self.labels), found.similarity, found.distance)
        return vote(found, self.labels, self.knn)


def bench_knn(
    *,
    sizes: Sequence[int],
    bits: Sequence[int],
    kinds: Sequence[IndexKind] = KINDS,
    K: int = 20,
    queries: int = MOST_QUERIES,
    repeats: int = 3,
    rivals: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> KnnBenchResult:
    """Time search and vote on generated codes.

    Args:
        sizes: N of each index.
        bits: B of each.
        kinds: Indexes.
        K: Neighbours.
        queries: Q at most; fewer for a large index.
        repeats: Rounds; the best of each way counts.
        rivals: Whether to time scikit-learn and USearch too.
        device: Where ``auto`` and ``torch`` search.
        progress: Who to tell.

    Raises:
        InputError: A size that does not fit into the memory, K, or bits that are no whole bytes.
    """
    progress = progress or Progress()
    check_sizes(sizes, bits, K)
    cases: list[Case] = []
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for N in sizes:
        for B in bits:
            progress.say(f"{N:,} codes of {B} bits")
            few = max(10, min(queries, PAIRS // N))
            setting = _Size(
                base=make_codes(N, B, 0), queries=make_codes(few, B, 1), labels=make_labels(min(N, LABELLED)),
                knn=KnnConfig(K=K), repeats=repeats,
            )  # fmt: skip
            reference = plain_index(setting.base)
            cases += _cases(setting, reference, device)
            wanted = reference.search(setting.queries, K)[1]
            rows += _indexes(setting, kinds, wanted, device, notes, progress)
            rows += _rivals(setting, wanted, notes, progress) if rivals else []
    lines = ("ceiling: FAISS's exhaustive search with its defaults, without a vote; a faster search passes it", *notes)
    facts = {"indexes": rows, "notes": notes, "K": K}
    return KnnBenchResult(title=f"search and vote, K {K}", cases=tuple(cases), facts=facts, lines=lines)


def _cases(setting: _Size, reference: Any, device: str) -> list[Case]:  # noqa: ANN401 - faiss has no types
    """The whole batch, and one query at a time, each beside the loop and beside FAISS's search alone."""
    index = build_hamming(setting.base, "auto", device)
    K, queries, labels = setting.knn.K, setting.queries, setting.labels
    some, one = queries[:LOOP_QUERIES], queries[: min(SINGLE, len(queries))]
    ways: dict[str, Callable[[], Any]] = {
        "loop": partial(loop, reference, some, labels, K),
        "ours": partial(setting.tag, index, queries),
        "faiss": partial(reference.search, queries, K),
        "single": partial(_one_by_one, partial(setting.tag, index), one),
        "faiss single": partial(_one_by_one, lambda query: reference.search(query, K), one),
    }
    best = best_of(ways, repeats=setting.repeats)
    plain = len(some) / best["loop"]
    return [
        Case(
            name=f"{setting.name}, {len(queries):,} queries", unit="queries", plain=plain,
            ours=len(queries) / best["ours"], ceiling=len(queries) / best["faiss"],
            note=f"index {index.kind}; {best['ours'] / best['faiss']:.2f} of the time of FAISS's search alone",
        ),
        Case(
            name=f"{setting.name}, one at a time", unit="queries", plain=plain, ours=len(one) / best["single"],
            ceiling=len(one) / best["faiss single"], note=f"index {index.kind}",
        ),
    ]  # fmt: skip


def _one_by_one(search: Callable[[Packed], Any], queries: Packed) -> None:
    for row in range(len(queries)):
        search(queries[row : row + 1])


def _indexes(
    setting: _Size, kinds: Sequence[IndexKind], wanted: Rows, device: str, notes: list[str], progress: Progress
) -> Iterator[dict[str, Any]]:
    for kind in kinds:
        if kind == "hnsw" and len(setting.base) > HNSW_MOST:
            notes.append(f"hnsw left out above {HNSW_MOST:,} codes: built on one thread, it would take too long")
            continue
        progress.say(f"  index {kind}")
        started = time.perf_counter()
        index = build_hamming(setting.base, kind, device)
        build_s = time.perf_counter() - started
        search = partial(_rows, index, setting.knn.K)
        name = f"auto ({index.kind})" if kind == "auto" else kind
        yield _row(setting, name, search, wanted, setting.repeats) | {"build_s": build_s, "n_bytes": index.n_bytes}


def _rows(index: Index, K: int, queries: Packed) -> Rows:
    return index.search(packed=queries, K=K).index


def _rivals(setting: _Size, wanted: Rows, notes: list[str], progress: Progress) -> Iterator[dict[str, Any]]:
    K = setting.knn.K
    ways: dict[str, Callable[[], Search | str]] = {
        "scikit-learn": partial(sklearn_search, setting.base, K, len(setting.queries)),
        "USearch, exact": partial(usearch_search, setting.base, K, exact=True),
        "USearch, graph": partial(usearch_search, setting.base, K, exact=False),
    }
    for name, build in ways.items():
        progress.say(f"  {name}")
        started = time.perf_counter()
        search = build()
        build_s = time.perf_counter() - started
        if isinstance(search, str):
            if search not in notes:
                notes.append(search)
            continue
        yield _row(setting, name, search, wanted, 1) | {"build_s": build_s, "n_bytes": None}


def _row(setting: _Size, name: str, search: Search, wanted: Rows, repeats: int) -> dict[str, Any]:
    """Batched and single queries of one index; recall is the share of the exact rows, ties by index."""
    found = search(setting.queries[:LOOP_QUERIES])
    Q = len(found)
    shared = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), wanted[:Q].tolist(), strict=True))
    counts: list[int] = []

    def batch() -> None:
        counts.append(len(search(setting.queries)))

    best = best_of({"batch": batch}, repeats=repeats)
    times = []
    slow = best["batch"] / counts[0] > 0.02
    for at in range(5 if slow else WARM_UP + SINGLE):
        row = at % len(setting.queries)
        started = time.perf_counter()
        search(setting.queries[row : row + 1])
        times.append(1e3 * (time.perf_counter() - started))
    kept = np.array(times if slow else times[WARM_UP:])
    return {
        "n_codes": len(setting.base), "bits": 8 * setting.base.shape[1], "index": name,
        "queries_per_s": counts[0] / best["batch"], "p50_ms": float(np.percentile(kept, 50)),
        "p95_ms": float(np.percentile(kept, 95)), "mean_ms": float(kept.mean()),
        "recall": shared / (Q * wanted.shape[1]),
    }  # fmt: skip


def _or_dash(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else form.format(scale * value)
