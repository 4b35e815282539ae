"""mmcli: tag an image with its caption, and show the neighbours that voted.

This module holds what every package may name: the version and the one error that is the user's to mend; and
:func:`load_head` and :class:`Tagger`, which import what they need when they are asked for, so that ``mmcli --help``
stays quick.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import device as Device  # noqa: N812

    from .heads.model import Head, MlpBaseline
    from .pipeline.tagger import Tagger

__version__ = "0.1.0"

_MOST_SHOWN, _LONGEST_PLACE = 200, 1000  # characters of what somebody gave, and of a path

__all__ = ["InputError", "Tagger", "__version__", "load_head"]


class InputError(ValueError):
    """The user's input is wrong; the command line prints it as one line and exits with 2.

    The line reads ``what: where: got ..., wanted ...; do``, with the parts that were given.

    Args:
        what: What is wrong, in a few words.
        where: The file, folder, option or row it was found in.
        got: What stood there; the line shows its first 200 characters.
        wanted: What should stand there.
        do: The command or the step that mends it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        wanted: object = None,
        do: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.wanted, self.do = what, where, got, wanted, do
        line = what if where is None else f"{what}: {_short(where, _LONGEST_PLACE)}"
        shown = None if got is None else _short(got, _MOST_SHOWN)
        found = [f"{name} {value}" for name, value in (("got", shown), ("wanted", wanted)) if value is not None]
        if found:
            line += ": " + ", ".join(found)
        if do is not None:
            line += f"; {do}"
        super().__init__(" ".join(line.split()))


def _short(value: object, most: int) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def load_head(path: "str | Path", device: "str | Device" = "cpu") -> "Head | MlpBaseline":
    """A trained head, ready to use.

    ``from mmcli import load_head`` and ``head = load_head("runs/x")`` are all it takes.

    Args:
        path: A run folder (its best checkpoint), a checkpoint file, or a folder that was saved for the hub.
        device: Where its parameters go: ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``auto``.

    Returns:
        The head in ``eval()`` mode: ``head(v_img, v_txt)`` takes raw embeddings ``(N, D)`` float32 and gives soft
        codes ``h`` ``(N, B)`` and ``logits`` ``(N, C)``; ``head.about["category_names"]`` names the C classes where
        they are known.

    Raises:
        InputError: Nothing is there, it is damaged or a pickle, or there is no such device.
    """
    from .pipeline.checkpoint import load_head as load

    return load(path, device)


def __getattr__(name: str) -> object:
    """``mmcli.Tagger``, imported when somebody wants it."""
    if name == "Tagger":
        from .pipeline.tagger import Tagger

        return Tagger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
