"""bench knn runs whole, small; its ways give the same answers; its ratios are of its own figures."""

import json
import sys

import numpy as np
import pytest

from mmcli import InputError
from mmcli.heads.config import KnnConfig
from mmcli.heads.knn import build_index
from mmcli.heads.voting import vote
from mmcli.pipeline.bench import knn as bench_rivals
from mmcli.pipeline.bench.knn import (
    loop,
    make_codes,
    make_labels,
    parse_numbers,
    plain_index,
    sklearn_search,
    usearch_search,
)


def test_bench_knn_gives_ratios_recall_and_notes(mmcli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    code, out, err = mmcli(
        "bench",
        "knn",
        "--sizes",
        "1k,2000",
        "--bits",
        "64",
        "--queries",
        50,
        "--repeats",
        1,
        "--device",
        "cpu",
        "--json",
    )
    assert code == 0, err
    result = json.loads(out)
    assert [case["case"] for case in result["cases"]] == [
        f"{n} codes of 64 bits, {what}" for n in ("1,000", "2,000") for what in ("50 queries", "one at a time")
    ]
    for case in result["cases"]:
        assert case["ratio_plain"] == pytest.approx(case["ours_per_s"] / case["plain_per_s"])
        assert case["ratio_ceiling"] == pytest.approx(case["ours_per_s"] / case["ceiling_per_s"])
    rows = {(row["n_codes"], row["index"]): row for row in result["indexes"]}
    names = ("auto (fastscan)", "flat", "scikit-learn")
    assert set(rows) == {(n, name) for n in (1000, 2000) for name in names}
    for (_, name), row in rows.items():
        assert row["p50_ms"] <= row["p95_ms"]
        assert row["recall"] == 1 if name in ("auto (fastscan)", "flat") else 0 < row["recall"] <= 1
    assert len(result["notes"]) == len(set(result["notes"])) == 1
    assert any("mmcli[usearch]" in note for note in result["notes"])
    code, out, _ = mmcli(
        "bench", "knn", "--sizes", "500", "--bits", "8", "--index", "auto", "--no-rivals", "--repeats", 1, "--quiet"
    )
    assert code == 0
    assert "recall" in out


def test_the_loop_and_ours_give_the_same_scores() -> None:
    base, queries, labels = make_codes(500, 64, 0), make_codes(20, 64, 1), make_labels(500)
    found = build_index("hamming", packed=base).search(packed=queries, K=20)
    np.testing.assert_allclose(
        vote(found, labels, KnnConfig(K=20)), loop(plain_index(base), queries, labels, 20), atol=1e-5
    )


def test_generated_codes_tie_as_learned_ones_do() -> None:
    base, queries = make_codes(20_000, 64, 0), make_codes(100, 64, 1)
    np.testing.assert_array_equal(base, make_codes(20_000, 64, 0))
    assert not np.array_equal(queries, base[:100])
    found = build_index("hamming", packed=base).search(packed=queries, K=20)
    assert 5 < np.median(found.distance[:, -1]) < 25
    assert make_labels(2000).sum(axis=1).mean() == pytest.approx(2.9, abs=0.2)


def test_rivals_search_the_same_codes_or_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    base, queries = make_codes(300, 64, 0), make_codes(7, 64, 1)
    wanted = plain_index(base).search(queries, 5)[0]
    search = sklearn_search(base, 5, 7)
    np.testing.assert_array_equal(np.bitwise_count(queries[:, None] ^ base[search(queries)]).sum(-1), wanted)
    monkeypatch.setattr(bench_rivals, "SKLEARN_MOST", 299)
    assert "above 299 codes" in sklearn_search(base, 5, 7)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    assert "not installed" in usearch_search(base, 5, exact=True)


def test_usearch_searches_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch.index")
    base, queries = make_codes(300, 64, 0), make_codes(7, 64, 1)
    wanted = plain_index(base).search(queries, 5)[0]
    for exact in (True, False):
        found = usearch_search(base, 5, exact=exact)(queries)
        np.testing.assert_array_equal(np.bitwise_count(queries[:, None] ^ base[found]).sum(-1), wanted)
    monkeypatch.setattr(bench_rivals, "USEARCH_MOST", 299)
    assert "above 299 codes" in usearch_search(base, 5, exact=False)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--sizes", "many"), ("--sizes", "many")),
        (("--sizes", "10"), ("--sizes", "at least 20")),
        (("--bits", "12"), ("--bits", "multiples of 8")),
        (("--index", "flat,tree"), ("--index", "tree", "fastscan")),
        (("--sizes", "900000M"), ("memory", "smaller size")),
    ],
)
def test_a_mistake_is_one_line(mmcli, words, parts) -> None:
    code, out, err = mmcli("bench", "knn", *words, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for part in parts:
        assert part in err


def test_sizes_are_read() -> None:
    assert parse_numbers("113287, 1M,2k,1_000", "--sizes") == (113287, 1_000_000, 2000, 1000)
    for bad in ("", "1.5M", "-3", "M"):
        with pytest.raises(InputError, match="not a number"):
            parse_numbers(bad, "--sizes")
