"""Sizes, bits and indexes of ``mmcli bench knn`` as they are given, and whether this machine has room for them."""

from collections.abc import Sequence
from typing import get_args

from ... import InputError
from ...heads.config import IndexKind

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
            "an index that does not fit into the memory", where="--sizes",
            got=f"{largest / 1e9:.0f} GB for {max(sizes):,} codes",
            wanted=f"at most {free / 1e9:.0f} GB, which is free", do="give a smaller size",
        )  # fmt: skip


def free_bytes() -> int | None:
    """Memory that is free, where the system says so."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as stream:  # noqa: PTH123
            found = [line.split()[1] for line in stream if line.startswith("MemAvailable")]
    except OSError:
        found = []
    return 1024 * int(found[0]) if found else None
