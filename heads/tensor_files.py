"""Safetensors files that carry a checksum, so that damage is found where they are read.

The header of a file holds ``mmcli_sha256``: the SHA-256, in hex, of the whole file with these 64 digits set to 0. It
covers names, dtypes, shapes, values and everything else that the header says. A file without it was written by an
earlier version or by another program, and is read as it is.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ..errors import first_line

if TYPE_CHECKING:
    from torch import Tensor  # what reads arrays alone loads no torch

CHECKSUM = "mmcli_sha256"
_UNSET = "0" * 64
_CHUNK = 1 << 20
_LENGTH = 8

Arrays = dict[str, npt.NDArray[Any]]


def write_tensors(
    path: Path, save: Callable[..., object], tensors: Mapping[str, Any], about: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with its checksum; the same content always gives the same bytes.

    Args:
        path: The file; one that is there is replaced, not atomically.
        save: ``save_file`` of ``safetensors.torch`` or ``safetensors.numpy``.
        tensors: What to write, by name; contiguous.
        about: Further entries of the header.

    Raises:
        OSError, SafetensorError: The file cannot be written.
    """
    save(dict(tensors), path, metadata={**(about or {}), CHECKSUM: _UNSET})
    _sort_metadata(path)
    place = _place_of(path, _UNSET)
    digits = _sha256(path, place)
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(digits.encode())


def read_about(path: Path) -> dict[str, str]:
    """The entries of a file's header, after its content was compared with its checksum.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no safetensors file, or its content is not what its checksum says.
    """
    # safetensors says of whatever it cannot open that it is not there, and waits for a FIFO without end.
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with path.open("rb"):
        pass
    try:
        with safe_open(path, framework="np") as file:
            about: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(first_line(error)) from error
    digits = about.pop(CHECKSUM, None)
    if digits is not None and (len(digits) != len(_UNSET) or _sha256(path, _place_of(path, digits)) != digits):
        raise ValueError("content that is not what its checksum says")
    return about


def load_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Every array of a file, and the entries of its header.

    Raises:
        OSError, ValueError: See :func:`read_about`.
    """
    return _load(path, "np", "cpu")


def load_tensors(path: Path, device: str) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Every tensor of a file, on a device, and the entries of its header.

    Raises:
        OSError, ValueError: See :func:`read_about`.
    """
    tensors, about = _load(path, "pt", device)
    # A copy, because what safetensors gives may be the mapped file itself, which others may cut short.
    return {name: value.clone() for name, value in tensors.items()}, about


def _load(path: Path, framework: str, device: str) -> tuple[dict[str, Any], dict[str, str]]:
    about = read_about(path)
    try:
        with safe_open(path, framework=framework, device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - no mapping
    except OSError:
        raise
    except Exception as error:  # a dtype that the framework lacks raises whatever it raises
        raise ValueError(first_line(error)) from error


def _sort_metadata(path: Path) -> None:
    """Put the entries of a header in order: the library writes them in one that differs from call to call."""
    header = _header(path)
    content = json.loads(header)
    content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header))
    if len(text) == len(header):
        with path.open("r+b") as stream:
            stream.seek(_LENGTH)
            stream.write(text)


def _place_of(path: Path, digits: str) -> int:
    """Where in the file the digits of its checksum begin."""
    place = _header(path).find(f'"{digits}"'.encode())
    if place < 0:
        raise ValueError("a checksum that is not written plainly")
    return _LENGTH + place + 1


def _header(path: Path) -> bytes:
    """The header of a safetensors file, JSON; eight bytes before it say how long it is."""
    with path.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(_LENGTH), "little"))


def _sha256(path: Path, place: int) -> str:
    """SHA-256 of a file whose 64 bytes from ``place`` on count as the digit 0."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        digest.update(stream.read(place))
        stream.seek(len(_UNSET), 1)
        digest.update(_UNSET.encode())
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
