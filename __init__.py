"""mmcli: tag an image with its caption, and show the neighbours that voted.

This module holds what every package may name: the version and the one error that is the user's to mend.
It imports nothing, so that ``mmcli --help`` stays quick.
"""

__version__ = "0.1.0"

__all__ = ["InputError", "__version__"]


class InputError(ValueError):
    """The user's input is wrong; the command line prints it as one line and exits with 2.

    The line reads ``what: where: got ..., wanted ...; do``, with the parts that were given.

    Args:
        what: What is wrong, in a few words.
        where: The file, folder, option or row it was found in.
        got: What stood there.
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
        line = what if where is None else f"{what}: {where}"
        found = [f"{name} {value}" for name, value in (("got", got), ("wanted", wanted)) if value is not None]
        if found:
            line += ": " + ", ".join(found)
        if do is not None:
            line += f"; {do}"
        super().__init__(" ".join(line.split()))
