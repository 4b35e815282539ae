"""The command line: the commands of :mod:`mmcli.pipeline.commands` under their names, and how a run of one ends.

Nothing heavy is imported, so that ``--help`` loads no torch. Progress goes to stderr; stdout gets the result, as text
or with ``--json`` as one JSON object. Exit 0 done, 2 the user's input is wrong, 130 interrupted, 1 anything else.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .errors import InputError, visible
from .pipeline.commands import bench, data, experiments, finetune, tagging, training
from .pipeline.commands.options import Panels
from .pipeline.core.cores import limit_threads
from .pipeline.core.interrupts import INTERRUPTED, Interrupted

# What the machine may say at any moment; any other error of the system is a defect, and keeps its traceback.
NO_FAULT_OF_OURS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ENODEV,
    errno.ENXIO,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EFBIG,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EHOSTUNREACH,
}


class Stopped(Exception):  # noqa: N818 - never shown: it carries an interruption past typer, which would hide it
    """Carries the interruption of a command, as its cause."""


class Commands(TyperGroup):
    """The commands; one that is interrupted says how to resume it."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer keeps click's classes private
        """Run a command, and let an interruption of it through."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped from error


app = typer.Typer(
    name="mmcli",
    cls=Commands,
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
cache_app = typer.Typer(
    help="Look at a store, check it, export it, or make one of embeddings from elsewhere.", rich_markup_mode=None
)
app.add_typer(cache_app, name="cache")
bench_app = typer.Typer(help="This machine's speed, side by side with the plain way.", rich_markup_mode=None)
app.add_typer(bench_app, name="bench")
index_app = typer.Typer(
    help="A file of samples that vote: build it, add and remove samples and tags without training.",
    rich_markup_mode=None,
)
app.add_typer(index_app, name="index")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Tag an image with its caption: frozen SigLIP2, learned hash codes, neighbours that vote and explain."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


app.command("demo")(data.demo)
app.command("prepare")(data.prepare)
app.command("extract")(data.extract)
app.command("train-head", cls=Panels)(training.train_head)
app.command("knn-eval")(training.knn_eval)
app.command("zero-shot")(training.zero_shot)
app.command("finetune", cls=Panels)(finetune.finetune)
app.command("compare")(training.compare)
app.command("runs")(training.runs)
app.command("ablate", cls=Panels)(experiments.ablate)
app.command("predict")(tagging.predict)
app.command("report")(experiments.report)
app.command("samples")(experiments.samples)
index_app.command("build")(tagging.index_build)
index_app.command("add")(tagging.index_add)
index_app.command("remove")(tagging.index_remove)
index_app.command("info")(tagging.index_info)
bench_app.command("extract")(bench.bench_extract)
bench_app.command("train")(bench.bench_train)
bench_app.command("knn")(bench.bench_knn)
bench_app.command("finetune")(bench.bench_finetune)
bench_app.command("ablate")(bench.bench_ablate)
cache_app.command("info")(data.cache_info)
cache_app.command("verify")(data.cache_verify)
cache_app.command("export")(data.cache_export)
cache_app.command("import")(data.cache_import)


def main() -> None:
    """Run the command line and exit with its code."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what batch systems send: the same as Ctrl-C
    _prepare_streams()
    limit_threads()
    # What filelock says where Python has no fcntl; locks are files there, and the pages on stores say so.
    warnings.filterwarnings("ignore", message="only soft file lock is available")
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except InputError as error:
        code = _complain(str(error), 2)
    except Stopped as stopped:
        why = stopped.__cause__ if isinstance(stopped.__cause__, Interrupted) else Interrupted()
        code = INTERRUPTED if why.silent else _complain(why.line(sys.argv[1:]), INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        code = _complain(Interrupted().line(sys.argv[1:]), INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe left, as `head` does
        code = 1
    except OSError as error:
        if error.errno not in NO_FAULT_OF_OURS:
            raise
        code = _complain(f"{error.strerror}: {error.filename or 'while writing'}; what was finished is kept", 1)
    except Exception as error:
        code = _explain(error)
        if code is None:
            raise
    _abandon_failed_streams()
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_streams() -> None:
    """Let stdout and stderr take any text, whatever their encoding; one that was closed goes nowhere."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # It takes the stream's number too. The next file would get it, and with it whatever a library prints.
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _abandon_failed_streams() -> None:
    """Give up what a stream still holds if it cannot be written: Python would complain of it once more at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _explain(error: Exception) -> int | None:
    """Print an error that can be said in one line; its exit code, or None for another."""
    if _is_memory_shortage(error):
        message = str(error).partition("\n")[0][:200] or "no memory left"
        do = "give a smaller batch, fewer patches or another device; what was finished is kept"
        return _complain(f"out of memory: {message}; {do}", 1)
    # Typer keeps its usage errors in a private module; they all have a message and an exit code.
    format_message = getattr(error, "format_message", None)
    if format_message is None:
        return None
    return _complain(f"{format_message().replace('Value error, ', '')} (see --help)", 2)


def _is_memory_shortage(error: Exception) -> bool:
    """Whether the device or the machine had no memory left."""
    if "torch" not in sys.modules:  # and there may be no room to import it
        return isinstance(error, MemoryError)
    from .pipeline.core.device import is_memory_shortage

    return is_memory_shortage(error)


def _complain(line: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr may be what failed
        print(f"mmcli: {visible(' '.join(line.split()))}", file=sys.stderr, flush=True)
    return code
