"""``mmcli bench knn``: search and vote beside the plan's loop, scikit-learn and USearch; every index with its recall.

Symbols: N codes of the index, Q queries, K neighbours, B bits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from ...errors import InputError
from ...heads.config import IndexKind, KnnConfig
from ...heads.knn import build_index
from ...heads.neighbours import Index, Neighbours, Packed, Rows, load_faiss
from ...heads.voting import vote
from ..core.console import FittingTable
from ..core.progress import Progress
from .harness import BenchResult, Case, best_of

Search = Callable[[Packed], Rows]

TAU = 0.07
# scikit-learn compares floats; a pair costs it about a hundred times what a popcount costs.
SKLEARN_PAIRS = 50_000_000
SKLEARN_MOST = 200_000
USEARCH_MOST = 200_000


def make_codes(n: int, bits: int, seed: int, *, centres: int = 2000, spread: float = 0.55) -> Packed:
    """Codes that lie in groups, as learned ones do: the signs of noise around centres, ``(n, B // 8)``.

    Nearest neighbours are a few bits away, and many codes tie. The centres depend on the bits alone.
    """
    middle = np.random.default_rng(bits).normal(size=(centres, bits)).astype(np.float32)
    rng = np.random.default_rng(seed)
    codes = np.empty((n, bits // 8), np.uint8)
    for start in range(0, n, 1 << 16):
        rows = slice(start, min(n, start + (1 << 16)))
        size = (rows.stop - start, bits)
        noise = rng.standard_normal(size, dtype=np.float32)
        codes[rows] = np.packbits(middle[rng.integers(0, centres, size[0])] + spread * noise > 0, axis=1)
    return codes


def make_labels(n: int, C: int = 80) -> npt.NDArray[np.uint8]:
    """Labels ``(n, C)`` with COCO's 2.9 tags an image on average."""
    return (np.random.default_rng(2).random((n, C), dtype=np.float32) < 2.9 / C).astype(np.uint8)


def plain_index(packed: Packed) -> Any:  # noqa: ANN401 - faiss has no types
    """FAISS's exhaustive index with its defaults."""
    index = load_faiss().IndexBinaryFlat(8 * packed.shape[1])
    index.add(packed)
    return index


def loop(index: Any, queries: Packed, labels: npt.NDArray[np.uint8], K: int) -> npt.NDArray[np.float64]:  # noqa: ANN401
    """The plan's loop: one search a query, then a NumPy vote over its neighbours, in scores ``(Q, C)``."""
    scores = np.zeros((len(queries), labels.shape[1]))
    for row in range(len(queries)):
        distance, neighbours = index.search(queries[row : row + 1], K)
        similarity = 1 - distance[0] / index.d
        weight = np.exp(similarity / TAU)
        weight /= weight.sum()
        for w, neighbour in zip(weight, neighbours[0], strict=True):
            scores[row] += w * labels[neighbour % len(labels)]
    return scores


def sklearn_search(packed: Packed, K: int, Q: int) -> Search | str:
    """Brute force of scikit-learn over unpacked bits; a note in its place where it would take too long."""
    try:
        from sklearn.neighbors import NearestNeighbors
    except ImportError:
        return "scikit-learn is not installed"
    if len(packed) > SKLEARN_MOST:
        return f"scikit-learn left out above {SKLEARN_MOST:,} codes: it would take too long"
    index = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="hamming").fit(np.unpackbits(packed, axis=1))
    few = min(Q, max(10, SKLEARN_PAIRS // len(packed)))
    return _first(lambda queries: index.kneighbors(np.unpackbits(queries, axis=1), return_distance=False), few)


def usearch_search(packed: Packed, K: int, *, exact: bool) -> Search | str:
    """USearch over packed bits: exhaustive, or its graph; a note in its place where it is absent or too slow."""
    try:
        from usearch.index import Index, MetricKind, search
    except ImportError:
        return "USearch is not installed (pip install 'mmcli[usearch]')"
    if exact:
        return lambda queries: np.asarray(search(packed, queries, K, MetricKind.Hamming, exact=True).keys, np.int64)
    if len(packed) > USEARCH_MOST:
        return f"USearch's graph left out above {USEARCH_MOST:,} codes: it would take too long to build"
    index = Index(ndim=8 * packed.shape[1], metric=MetricKind.Hamming, dtype="b1")
    index.add(np.arange(len(packed)), packed)
    return lambda queries: np.asarray(index.search(queries, K).keys, np.int64).reshape(len(queries), -1)


def _first(search: Search, few: int) -> Search:
    """Only the first queries, so that it ends; a rate is a rate."""
    return lambda queries: search(queries[:few])


MEMORY_A_BYTE = 5  # of codes: themselves, FAISS's copies and what stands beside them


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """``113287,1M,10M`` as numbers.

    Raises:
        InputError: One is not a number.
    """
    found = []
    for part in text.split(","):
        word = part.strip().lower().replace("_", "")
        scale = {"k": 1000, "m": 1_000_000}.get(word[-1:], 1)
        digits = word if scale == 1 else word[:-1]
        if not digits.isdecimal():
            raise InputError("not a number", where=option, got=repr(part), wanted="numbers such as 113287,1M")
        found.append(int(digits) * scale)
    return tuple(dict.fromkeys(found))


def parse_kinds(text: str) -> tuple[IndexKind, ...]:
    """Names of indexes.

    Raises:
        InputError: One is unknown.
    """
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    known: dict[str, IndexKind] = {kind: kind for kind in get_args(IndexKind)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError("no such index", where="--index", got=", ".join(unknown), wanted=", ".join(known))
    return tuple(known[name] for name in names)


def check_sizes(sizes: Sequence[int], bits: Sequence[int], K: int) -> None:
    """Refuse indexes that cannot be made here.

    Args:
        sizes: N of each.
        bits: B of each.
        K: Neighbours.

    Raises:
        InputError: Fewer codes than neighbours, bits that are no whole bytes, or codes that do not fit into the memory.
    """
    if not sizes or min(sizes) < K or K < 1:
        raise InputError("no index of that size", where="--sizes", got=f"{list(sizes)}, K {K}", wanted=f"at least {K}")
    if not bits or any(B < 8 or B % 8 for B in bits):
        raise InputError("codes are whole bytes", where="--bits", got=f"{list(bits)}", wanted="multiples of 8")
    free, largest = free_bytes(), max(sizes) * max(bits) // 8 * MEMORY_A_BYTE
    if free is not None and largest > free:
        raise InputError(
            "an index that does not fit into the memory",
            where="--sizes",
            got=f"{largest / 1e9:.0f} GB for {max(sizes):,} codes",
            wanted=f"at most {free / 1e9:.0f} GB, which is free",
            do="give a smaller size",
        )


def free_bytes() -> int | None:
    """Memory that is free, where the system says so."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as stream:  # noqa: PTH123
            found = [line.split()[1] for line in stream if line.startswith("MemAvailable")]
    except OSError:
        found = []
    return 1024 * int(found[0]) if found else None


SINGLE, WARM_UP = 200, 20
MOST_QUERIES, PAIRS = 5000, 1 << 30  # so that a batch of a large index ends
LOOP_QUERIES = 500
LABELLED = 1_000_000  # labels of more rows are those of row % LABELLED: a vote costs the same
KINDS: tuple[IndexKind, ...] = ("auto", "flat")


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
                f"{row['n_codes']:,}",
                str(row["bits"]),
                row["index"],
                f"{row['queries_per_s']:,.0f}",
                f"{row['p50_ms']:.3f}",
                f"{row['p95_ms']:.3f}",
                _or_dash(row["build_s"], "{:.2f}"),
                _or_dash(row["n_bytes"], "{:,.1f}", 1e-6),
                f"{row['recall']:.4f}",
            )
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
                base=make_codes(N, B, 0),
                queries=make_codes(few, B, 1),
                labels=make_labels(min(N, LABELLED)),
                knn=KnnConfig(K=K),
                repeats=repeats,
            )
            reference = plain_index(setting.base)
            cases += _cases(setting, reference, device)
            wanted = reference.search(setting.queries, K)[1]
            rows += _indexes(setting, kinds, wanted, device, progress)
            rows += _rivals(setting, wanted, notes, progress) if rivals else []
    lines = ("ceiling: FAISS's exhaustive search with its defaults, without a vote; a faster search passes it", *notes)
    facts = {"indexes": rows, "notes": notes, "K": K}
    return KnnBenchResult(title=f"search and vote, K {K}", cases=tuple(cases), facts=facts, lines=lines)


def _cases(setting: _Size, reference: Any, device: str) -> list[Case]:  # noqa: ANN401 - faiss has no types
    """The whole batch, and one query at a time, each beside the loop and beside FAISS's search alone."""
    index = build_index("hamming", packed=setting.base, device=device)
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
            name=f"{setting.name}, {len(queries):,} queries",
            unit="queries",
            plain=plain,
            ours=len(queries) / best["ours"],
            ceiling=len(queries) / best["faiss"],
            note=f"index {index.kind}; {best['ours'] / best['faiss']:.2f} of the time of FAISS's search alone",
        ),
        Case(
            name=f"{setting.name}, one at a time",
            unit="queries",
            plain=plain,
            ours=len(one) / best["single"],
            ceiling=len(one) / best["faiss single"],
            note=f"index {index.kind}",
        ),
    ]


def _one_by_one(search: Callable[[Packed], Any], queries: Packed) -> None:
    for row in range(len(queries)):
        search(queries[row : row + 1])


def _indexes(
    setting: _Size, kinds: Sequence[IndexKind], wanted: Rows, device: str, progress: Progress
) -> Iterator[dict[str, Any]]:
    for kind in kinds:
        progress.say(f"  index {kind}")
        started = time.perf_counter()
        index = build_index("hamming", packed=setting.base, kind=kind, device=device)
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
        "n_codes": len(setting.base),
        "bits": 8 * setting.base.shape[1],
        "index": name,
        "queries_per_s": counts[0] / best["batch"],
        "p50_ms": float(np.percentile(kept, 50)),
        "p95_ms": float(np.percentile(kept, 95)),
        "mean_ms": float(kept.mean()),
        "recall": shared / (Q * wanted.shape[1]),
    }


def _or_dash(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else form.format(scale * value)
