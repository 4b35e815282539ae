"""The message after Ctrl-C: what was kept, and the command line that resumes it."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# The exit code.
INTERRUPTED = 130


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what a person wants to know then.

    Args:
        kept: What is kept.
        commands: Command lines that resume it, each as words after ``mmcli``; the same one again when not given.
        without: Options that the same one is to be given without.
        also: Options that it is to be given as well.
        silent: Whether another process has said it all.
    """

    def __init__(
        self,
        kept: str = "what was finished is kept",
        *,
        commands: Sequence[Sequence[str]] = (),
        without: Sequence[str] = (),
        also: Sequence[str] = (),
        silent: bool = False,
    ) -> None:
        super().__init__(kept)
        self.kept, self.silent = kept, silent
        self._commands, self._without, self._also = commands, without, also

    def line(self, words: Sequence[str]) -> str:
        """All of it in one line.

        Args:
            words: The command line that was interrupted, after ``mmcli``.
        """
        again = [word for word in words if word not in self._without]
        again += [word for word in self._also if word not in again]
        commands = [shlex.join(["mmcli", *command]) for command in self._commands or [again]]
        return f"interrupted; {self.kept}; resume with `{' && '.join(commands)}`"


@contextmanager
def interruptible(
    kept: str = "what was finished is kept", *, without: Sequence[str] = (), also: Sequence[str] = ()
) -> Iterator[None]:
    """Interruptions of what is done inside become :class:`Interrupted`, whatever a part of it says."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(kept, without=without, also=also) from error
