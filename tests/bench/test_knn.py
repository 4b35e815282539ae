"""bench knn runs whole, small; its ways give the same answers; its ratios are of its own figures."""

import json

import numpy as np
import pytest

from mmcli import InputError
from mmcli.heads.config import KnnConfig
from mmcli.heads.knn import build_index
from mmcli.heads.voting import vote
from mmcli.pipeline.bench.knn import (
    loop,
    make_codes,
    make_labels,
    parse_numbers,
    plain_index,
    sklearn_search,
)


def test_bench_knn_gives_ratios_and_recall(mmcli) -> None:
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
    assert {case["case"] for case in result["cases"]} == {
        f"{n} codes of 64 bits, {what}{kind}"
        for n in ("1,000", "2,000")
        for what in ("50 queries", "one at a time")
        for kind in ("", ", flat")
    }
    for case in result["cases"]:
        assert case["ratio_plain"] == pytest.approx(case["ours_per_s"] / case["plain_per_s"])
        assert case["ratio_ceiling"] == pytest.approx(case["ours_per_s"] / case["ceiling_per_s"])
    rows = {(row["n_codes"], row["index"]): row for row in result["indexes"]}
    assert set(rows) == {(n, name) for n in (1000, 2000) for name in ("auto (fastscan)", "flat", "scikit-learn")}
    for (_, name), row in rows.items():
        assert row["queries_per_s"] > 0 if name == "scikit-learn" else row["recall"] == 1
    code, out, _ = mmcli(
        "bench", "knn", "--sizes", "500", "--bits", "8", "--index", "auto", "--no-baselines", "--repeats", 1, "--quiet"
    )
    assert code == 0
    assert "recall" in out


def test_the_loop_and_ours_give_the_same_scores() -> None:
    base, queries, labels = make_codes(500, 64, 0), make_codes(20, 64, 1), make_labels(500)
    neighbours = build_index("hamming", packed=base).search(packed=queries, K=20)
    np.testing.assert_allclose(
        vote(neighbours, labels, KnnConfig(K=20)), loop(plain_index(base), queries, labels, 20), atol=1e-5
    )


def test_generated_codes_tie_as_learned_ones_do() -> None:
    base, queries = make_codes(20_000, 64, 0), make_codes(100, 64, 1)
    np.testing.assert_array_equal(base, make_codes(20_000, 64, 0))
    assert not np.array_equal(queries, base[:100])
    neighbours = build_index("hamming", packed=base).search(packed=queries, K=20)
    assert 5 < np.median(neighbours.distance[:, -1]) < 25
    assert make_labels(2000).sum(axis=1).mean() == pytest.approx(2.9, abs=0.2)


def test_scikit_learn_searches_the_same_codes() -> None:
    base, queries = make_codes(300, 64, 0), make_codes(7, 64, 1)
    wanted = plain_index(base).search(queries, 5)[0]
    rows = sklearn_search(base, 5)(queries)
    np.testing.assert_array_equal(np.bitwise_count(queries[:, None] ^ base[rows]).sum(-1), wanted)


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
