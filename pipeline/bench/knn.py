"""``mmcli bench knn``: search and vote, beside the plain loop and scikit-learn; every index with its recall.

Symbols: N codes of the index, Q queries, K neighbours, B bits.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors

from ...errors import InputError
from ...heads.config import IndexKind, KnnConfig
from ...heads.knn import build_hamming
from ...heads.neighbours import Index, Neighbours, Packed, Rows, load_faiss
from ...heads.voting import vote
from ..core.console import FittingTable
from ..core.progress import Progress
from .harness import BenchResult, Case, best_of

Search = Callable[[Packed], Rows]

KINDS: tuple[IndexKind, ...] = ("auto", "flat", "ivf", "hnsw", "multihash")
TAU = 0.07
# scikit-learn compares floats; a pair costs it about a hundred times what a popcount costs.
SKLEARN_PAIRS = 50_000_000
SKLEARN_MOST = 200_000
MEMORY_A_BYTE = 5  # of codes: themselves, FAISS's copies and what stands beside them
SINGLE, WARM_UP = 200, 20
MOST_QUERIES, PAIRS = 5000, 1 << 30  # so that a batch of a large index ends
LOOP_QUERIES = 500
LABELLED = 1_000_000  # labels of more rows are those of row % LABELLED: a vote costs the same
HNSW_MOST = 200_000
# A single query that takes longer is measured a few times only.
SLOW_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One size of index, with its queries and labels."""

    base: Packed
    queries: Packed
    labels: npt.NDArray[np.uint8]
    knn: KnnConfig
    repeats: int
    device: str

    @property
    def name(self) -> str:
        """The size in words."""
        return f"{len(self.base):,} codes of {8 * self.base.shape[1]} bits"

    def tag(self, index: Index, queries: Packed) -> npt.NDArray[np.float32]:
        """Scores ``(Q, C)``, by search and vote."""
        neighbours = index.search(packed=queries, K=self.knn.K)
        if len(self.base) > len(self.labels):
            rows = neighbours.index % len(self.labels)
            neighbours = Neighbours(rows, neighbours.similarity, neighbours.distance)
        return vote(neighbours, self.labels, self.knn)


def bench_knn(
    *,
    sizes: Sequence[int],
    bits: Sequence[int],
    kinds: Sequence[IndexKind] = KINDS,
    K: int = 20,
    queries: int = MOST_QUERIES,
    repeats: int = 3,
    baselines: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BenchResult:
    """Time search and vote on generated codes.

    Args:
        sizes: N of each index.
        bits: B of each.
        kinds: Indexes.
        K: Neighbours.
        queries: Q at most; fewer for a large index.
        repeats: Rounds; the best of each way counts.
        baselines: Whether to time scikit-learn too.
        device: Where ``auto`` and ``torch`` search.
        progress: Progress bars and messages; silent by default.

    Returns:
        Two cases for each size and number of bits, a batch of queries and one at a time; as facts a row for every index
        and for scikit-learn.

    Raises:
        InputError: A size that does not fit into the memory, K, or bits that are no whole bytes.
    """
    progress = progress or Progress()
    check_sizes(sizes, bits, K)
    cases: list[Case] = []
    rows: list[dict[str, Any]] = []
    for N in sizes:
        for B in bits:
            progress.say(f"{N:,} codes of {B} bits")
            setting = Setting(
                base=make_codes(N, B, 0),
                queries=make_codes(max(10, min(queries, PAIRS // N)), B, 1),
                labels=make_labels(min(N, LABELLED)),
                knn=KnnConfig(K=K),
                repeats=repeats,
                device=device,
            )
            exact = plain_index(setting.base)
            cases += _cases(setting, exact)
            wanted = exact.search(setting.queries, K)[1]
            rows += [_index_row(setting, kind, wanted, progress) for kind in kinds if kind != "hnsw" or N <= HNSW_MOST]
            if baselines and N <= SKLEARN_MOST:
                rows.append(_sklearn_row(setting, wanted, progress))
    lines = [
        "ceiling: FAISS's exhaustive search with its defaults, without a vote; a faster search passes it",
        f"left out above {HNSW_MOST:,} codes, where it would take too long: hnsw, which is built on one thread,"
        " and scikit-learn",
    ]
    return BenchResult(
        title=f"search and vote, K {K}",
        cases=tuple(cases),
        facts={"indexes": rows, "K": K},
        lines=tuple(lines[: 1 + (max(sizes) > HNSW_MOST)]),
        tables=(index_table(rows),),
    )


def index_table(rows: Sequence[dict[str, Any]]) -> FittingTable:
    """A line for every index, and for scikit-learn."""
    table = FittingTable(title="every index beside the exact one")
    for name in ("codes", "bits", "index", "queries/s", "p50 ms", "p95 ms", "build s", "MB", "recall"):
        table.add_column(name, justify="left" if name == "index" else "right")
    for row in rows:
        table.add_row(
            f"{row['n_codes']:,}",
            str(row["bits"]),
            row["index"],
            f"{row['queries_per_s']:,.0f}",
            f"{row['p50_ms']:.3f}",
            f"{row['p95_ms']:.3f}",
            f"{row['build_s']:.2f}",
            "-" if row["n_bytes"] is None else f"{1e-6 * row['n_bytes']:,.1f}",
            f"{row['recall']:.4f}",
        )
    return table


def make_codes(n: int, bits: int, seed: int, *, centres: int = 2000, spread: float = 0.55) -> Packed:
    """Codes that lie in groups, as learned ones do: the signs of noise around centres, ``(n, B // 8)``.

    Nearest neighbours are a few bits away, and many codes tie. The centres depend on the bits alone.
    """
    middle = np.random.default_rng(bits).normal(size=(centres, bits)).astype(np.float32)
    rng = np.random.default_rng(seed)
    codes = np.empty((n, bits // 8), np.uint8)
    for start in range(0, n, 1 << 16):
        rows = codes[start : start + (1 << 16)]
        noise = rng.standard_normal((len(rows), bits), dtype=np.float32)
        rows[:] = np.packbits(middle[rng.integers(0, centres, len(rows))] + spread * noise > 0, axis=1)
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
    """The plain way: one search a query, then a NumPy vote over its neighbours, in scores ``(Q, C)``."""
    scores = np.zeros((len(queries), labels.shape[1]))
    for row in range(len(queries)):
        distance, neighbours = index.search(queries[row : row + 1], K)
        similarity = 1 - distance[0] / index.d
        weight = np.exp(similarity / TAU)
        weight /= weight.sum()
        for w, neighbour in zip(weight, neighbours[0], strict=True):
            scores[row] += w * labels[neighbour % len(labels)]
    return scores


def sklearn_search(packed: Packed, K: int) -> Search:
    """Brute force of scikit-learn over unpacked bits, of as many queries as end soon: a rate is a rate."""
    index = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="hamming").fit(np.unpackbits(packed, axis=1))
    few = max(10, SKLEARN_PAIRS // len(packed))

    def search(queries: Packed) -> Rows:
        rows: Rows = index.kneighbors(np.unpackbits(queries[:few], axis=1), return_distance=False)
        return rows

    return search


def _cases(setting: Setting, exact: Any) -> list[Case]:  # noqa: ANN401 - faiss has no types
    """The whole batch, and one query at a time, each beside the loop and beside FAISS's search alone."""
    index = build_hamming(setting.base, "auto", setting.device)
    K, queries, labels = setting.knn.K, setting.queries, setting.labels
    some, single = queries[:LOOP_QUERIES], queries[:SINGLE]
    best = best_of(
        {
            "plain": partial(loop, exact, some, labels, K),
            "ours": partial(setting.tag, index, queries),
            "faiss": partial(exact.search, queries, K),
            "single": partial(_one_by_one, partial(setting.tag, index), single),
            "faiss single": partial(_one_by_one, lambda query: exact.search(query, K), single),
        },
        repeats=setting.repeats,
    )
    plain, note = len(some) / best["plain"], f"index {index.kind}"
    return [
        Case(
            name=f"{setting.name}, {len(queries):,} queries",
            unit="queries",
            plain=plain,
            ours=len(queries) / best["ours"],
            ceiling=len(queries) / best["faiss"],
            note=f"{note}; {best['ours'] / best['faiss']:.2f} of the time of FAISS's search alone",
        ),
        Case(
            name=f"{setting.name}, one at a time",
            unit="queries",
            plain=plain,
            ours=len(single) / best["single"],
            ceiling=len(single) / best["faiss single"],
            note=note,
        ),
    ]


def _one_by_one(search: Callable[[Packed], Any], queries: Packed) -> None:
    for row in range(len(queries)):
        search(queries[row : row + 1])


def _index_row(setting: Setting, kind: IndexKind, wanted: Rows, progress: Progress) -> dict[str, Any]:
    progress.say(f"  index {kind}")
    started = time.perf_counter()
    index = build_hamming(setting.base, kind, setting.device)
    built = {"build_s": time.perf_counter() - started, "n_bytes": index.n_bytes}
    name = f"auto ({index.kind})" if kind == "auto" else kind
    return _row(setting, name, partial(_rows, index, setting.knn.K), wanted, setting.repeats) | built


def _sklearn_row(setting: Setting, wanted: Rows, progress: Progress) -> dict[str, Any]:
    progress.say("  scikit-learn")
    started = time.perf_counter()
    search = sklearn_search(setting.base, setting.knn.K)
    built = {"build_s": time.perf_counter() - started, "n_bytes": None}
    return _row(setting, "scikit-learn", search, wanted, 1) | built


def _rows(index: Index, K: int, queries: Packed) -> Rows:
    return index.search(packed=queries, K=K).index


def _row(setting: Setting, name: str, search: Search, wanted: Rows, repeats: int) -> dict[str, Any]:
    """Batched and single queries of one index; recall is the share of the exact rows, ties by index."""
    rows = search(setting.queries[:LOOP_QUERIES])
    shared = sum(len(set(a) & set(b)) for a, b in zip(rows.tolist(), wanted.tolist(), strict=False))
    answered = len(search(setting.queries))
    batch_s = best_of({"batch": partial(search, setting.queries)}, repeats=repeats)["batch"]
    slow = batch_s / answered > SLOW_S
    times = []
    for number in range(5 if slow else WARM_UP + SINGLE):
        row = number % len(setting.queries)
        started = time.perf_counter()
        search(setting.queries[row : row + 1])
        times.append(1e3 * (time.perf_counter() - started))
    kept = np.array(times if slow else times[WARM_UP:])
    return {
        "n_codes": len(setting.base),
        "bits": 8 * setting.base.shape[1],
        "index": name,
        "queries_per_s": answered / batch_s,
        "p50_ms": float(np.percentile(kept, 50)),
        "p95_ms": float(np.percentile(kept, 95)),
        "mean_ms": float(kept.mean()),
        "recall": shared / rows.size,
    }


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """``113287,1M,10M`` as numbers.

    Raises:
        InputError: A part is not a number.
    """
    numbers = []
    for part in text.split(","):
        word = part.strip().lower().replace("_", "")
        scale = {"k": 1000, "m": 1_000_000}.get(word[-1:], 1)
        digits = word if scale == 1 else word[:-1]
        if not digits.isdecimal():
            raise InputError("not a number", where=option, got=repr(part), wanted="numbers such as 113287,1M")
        numbers.append(int(digits) * scale)
    return tuple(dict.fromkeys(numbers))


def parse_kinds(text: str) -> tuple[IndexKind, ...]:
    """Names of indexes.

    Raises:
        InputError: A name is unknown.
    """
    names = dict.fromkeys(part.strip().lower() for part in text.split(","))
    unknown = [name for name in names if name not in get_args(IndexKind)]
    if unknown:
        wanted = ", ".join(get_args(IndexKind))
        raise InputError("no such index", where="--index", got=", ".join(unknown), wanted=wanted)
    return tuple(cast("IndexKind", name) for name in names)


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
            lines = [line.split()[1] for line in stream if line.startswith("MemAvailable")]
    except OSError:
        lines = []
    return 1024 * int(lines[0]) if lines else None
