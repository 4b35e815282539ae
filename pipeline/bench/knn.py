"""``mmcli bench knn``: search and vote, beside the plain loop, FAISS alone and scikit-learn.

Symbols: N codes of the index, Q queries, K neighbours, B bits.
"""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors

from ...errors import InputError
from ...heads.config import IndexKind, KnnConfig
from ...heads.knn import build_index
from ...heads.neighbours import Index, Neighbours, Packed, Rows, load_faiss
from ...heads.voting import vote
from ..core.progress import Progress
from .harness import BenchResult, Case, Way, best_of

KINDS: tuple[IndexKind, ...] = ("auto", "flat")
TAU = 0.07
# scikit-learn compares floats; a pair costs it about a hundred times what a popcount costs.
SKLEARN_PAIRS, SKLEARN_MOST = 20_000_000, 200_000
MEMORY_A_BYTE = 5  # of codes: themselves, FAISS's copies and what stands beside them
MOST_QUERIES, PAIRS = 5000, 1 << 30  # so that a batch of a large index ends
SINGLE, LOOP_QUERIES = 200, 500
LABELLED = 1_000_000  # labels of more rows are those of row % LABELLED: a vote costs the same


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One size of index, with its queries and labels."""

    base: Packed
    queries: Packed
    labels: npt.NDArray[np.uint8]
    knn: KnnConfig

    @property
    def name(self) -> str:
        """The number of codes and bits, in words."""
        return f"{len(self.base):,} codes of {8 * self.base.shape[1]} bits"

    @cached_property
    def exact(self) -> Any:  # noqa: ANN401 - faiss has no types
        """FAISS's exhaustive index with its defaults."""
        return plain_index(self.base)

    def recall(self, index: Index) -> float:
        """Share of the exact neighbours that an index finds, ties by index."""
        some, K = self.queries[:LOOP_QUERIES], self.knn.K
        rows, wanted = index.search(packed=some, K=K).index, self.exact.search(some, K)[1]
        return sum(len(set(a) & set(b)) for a, b in zip(rows.tolist(), wanted.tolist(), strict=True)) / rows.size

    def tag(self, index: Index, queries: Packed) -> npt.NDArray[np.float32]:
        """Scores ``(Q, C)``, by search and vote."""
        neighbours = index.search(packed=queries, K=self.knn.K)
        if len(self.base) > len(self.labels):
            rows = neighbours.index % len(self.labels)
            neighbours = Neighbours(rows, neighbours.similarity, neighbours.distance)
        return vote(neighbours, self.labels, self.knn)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The codes, queries and indexes that are timed.

    Attributes:
        sizes: N of each index.
        bits: B of each.
        kinds: Indexes.
        K: Neighbours.
        queries: Q at most; fewer for a large index.

    Raises:
        InputError: Fewer codes than neighbours, bits that are no whole bytes, or codes that do not fit into the memory.
    """

    sizes: Sequence[int]
    bits: Sequence[int]
    kinds: Sequence[IndexKind] = KINDS
    K: int = 20
    queries: int = MOST_QUERIES

    def __post_init__(self) -> None:
        sizes, bits, K = self.sizes, self.bits, self.K
        if not sizes or min(sizes) < K or K < 1:
            got = f"{list(sizes)}, K {K}"
            raise InputError("no index of that size", where="--sizes", got=got, wanted=f"at least {K}")
        if not bits or any(B < 8 or B % 8 for B in bits):
            raise InputError("codes are whole bytes", where="--bits", got=f"{list(bits)}", wanted="multiples of 8")
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        needed = max(sizes) * max(bits) // 8 * MEMORY_A_BYTE
        if needed > memory:
            raise InputError(
                "an index that does not fit into the memory",
                where="--sizes",
                got=f"{needed / 1e9:.0f} GB for {max(sizes):,} codes",
                wanted=f"at most {memory / 1e9:.0f} GB",
                do="give a smaller size",
            )


def bench_knn(
    workload: Workload,
    *,
    repeats: int = 3,
    baselines: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BenchResult:
    """Time search and vote on generated codes.

    Args:
        workload: What is searched.
        repeats: Rounds; the best of each way counts.
        baselines: Whether to time scikit-learn too.
        device: Where ``auto`` and ``torch`` search.
        progress: Progress bars and messages; silent by default.

    Returns:
        Two cases for each size, number of bits and index: a batch of queries, and one query at a time. As facts the
        build time, bytes and recall of every index, and the rate of scikit-learn.
    """
    progress = progress or Progress()
    cases: list[Case] = []
    rows: list[dict[str, Any]] = []
    for N, B in itertools.product(workload.sizes, workload.bits):
        progress.say(f"{N:,} codes of {B} bits")
        setting = Setting(
            base=make_codes(N, B, 0),
            queries=make_codes(max(10, min(workload.queries, PAIRS // N)), B, 1),
            labels=make_labels(min(N, LABELLED)),
            knn=KnnConfig(K=workload.K),
        )
        indexes = {}
        for kind in workload.kinds:
            started = time.perf_counter()
            indexes[kind] = build_index("hamming", packed=setting.base, kind=kind, device=device)
            built = {"build_s": time.perf_counter() - started, "n_bytes": indexes[kind].n_bytes}
            rows.append({"n_codes": N, "bits": B, "index": _label(kind, indexes[kind]), **built})
            rows[-1]["recall"] = setting.recall(indexes[kind])
        cases += _cases(setting, indexes, repeats)
        if baselines and N <= SKLEARN_MOST:
            rows.append({"n_codes": N, "bits": B, "index": "scikit-learn", **_sklearn_rate(setting)})
    lines = ("ceiling: FAISS's exhaustive search with its defaults, without a vote; a faster search passes it",)
    return BenchResult(
        title=f"search and vote, K {workload.K}",
        cases=tuple(cases),
        facts={"indexes": rows, "K": workload.K},
        lines=(*lines, *map(_line, rows)),
    )


def _cases(setting: Setting, indexes: Mapping[IndexKind, Index], repeats: int) -> list[Case]:
    """The whole batch and one query at a time, with every index, each beside the loop and FAISS's search alone."""
    K, queries, exact = setting.knn.K, setting.queries, setting.exact
    some, single = queries[:LOOP_QUERIES], queries[:SINGLE]
    ways: dict[str, Way] = {
        "plain": partial(loop, exact, some, setting.labels, K),
        "faiss": partial(exact.search, queries, K),
        "faiss single": partial(_one_by_one, lambda query: exact.search(query, K), single),
    }
    for kind, index in indexes.items():
        ways[kind] = partial(setting.tag, index, queries)
        ways[f"{kind} single"] = partial(_one_by_one, partial(setting.tag, index), single)
    best = best_of(ways, repeats=repeats)
    cases = []
    for kind, index in indexes.items():
        for way, n, what in (
            ("", len(queries), f"{len(queries):,} queries"),
            (" single", len(single), "one at a time"),
        ):
            case = Case(
                name=f"{setting.name}, {what}" + ("" if kind == "auto" else f", {kind}"),
                unit="queries",
                plain=len(some) / best["plain"],
                ours=n / best[f"{kind}{way}"],
                ceiling=n / best[f"faiss{way}"],
                note=f"index {index.kind}",
            )
            cases.append(case)
    return cases


def _one_by_one(search: Callable[[Packed], object], queries: Packed) -> None:
    for row in range(len(queries)):
        search(queries[row : row + 1])


def _sklearn_rate(setting: Setting) -> dict[str, float]:
    """Queries a second of scikit-learn's brute force, of as many queries as end soon: a rate is a rate."""
    search = sklearn_search(setting.base, setting.knn.K)
    queries = setting.queries[: max(10, SKLEARN_PAIRS // len(setting.base))]
    return {"queries_per_s": len(queries) / best_of({"search": partial(search, queries)}, repeats=1)["search"]}


def _label(kind: IndexKind, index: Index) -> str:
    return f"auto ({index.kind})" if kind == "auto" else kind


def _line(row: Mapping[str, Any]) -> str:
    """What is said of an index, or of scikit-learn, below the table."""
    start = f"{row['n_codes']:,} codes of {row['bits']} bits, {row['index']}:"
    if "queries_per_s" in row:
        return f"{start} {row['queries_per_s']:,.0f} queries/s"
    return f"{start} built in {row['build_s']:.2f} s, {1e-6 * row['n_bytes']:,.1f} MB, recall {row['recall']:.4f}"


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


def sklearn_search(packed: Packed, K: int) -> Callable[[Packed], Rows]:
    """Brute force of scikit-learn over unpacked bits: the function from queries to the rows of their neighbours."""
    index = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="hamming").fit(np.unpackbits(packed, axis=1))

    def search(queries: Packed) -> Rows:
        rows: Rows = index.kneighbors(np.unpackbits(queries, axis=1), return_distance=False)
        return rows

    return search


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Parse a list of numbers such as ``113287,1M,10M``.

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
    """Parse a list of names of indexes.

    Raises:
        InputError: A name is unknown.
    """
    names = dict.fromkeys(part.strip().lower() for part in text.split(","))
    unknown = [name for name in names if name not in get_args(IndexKind)]
    if unknown:
        wanted = ", ".join(get_args(IndexKind))
        raise InputError("no such index", where="--index", got=", ".join(unknown), wanted=wanted)
    return tuple(cast("IndexKind", name) for name in names)
