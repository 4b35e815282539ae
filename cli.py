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
from pathlib import Path
from typing import Annotated

import typer

from . import InputError, __version__
from .pipeline.commands import ablate, bench, cache, compare, data, finetune, heads, index, predict, report
from .pipeline.commands.options import Panels
from .pipeline.cores import limit_threads

INTERRUPTED = 130
# What the machine may say at any moment; any other error of the system is a defect, and keeps its traceback.
NO_FAULT_OF_OURS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE,
    errno.ENOMEM, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip

app = typer.Typer(
    name="mmcli", add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
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


app.command()(data.demo)
app.command()(data.prepare)
app.command()(data.extract)
app.command("train-head", cls=Panels)(heads.train_head)
app.command("knn-eval")(heads.knn_eval)
app.command("zero-shot")(heads.zero_shot)
app.command("finetune", cls=Panels)(finetune.finetune)
app.command()(compare.compare)
app.command("ablate", cls=Panels)(ablate.ablate)
app.command("predict")(predict.predict)
app.command("report")(report.report)
app.command("samples")(report.samples)
index_app.command("build")(index.index_build)
index_app.command("add")(index.index_add)
index_app.command("remove")(index.index_remove)
index_app.command("info")(index.index_info)
bench_app.command("extract")(bench.bench_extract)
bench_app.command("train")(bench.bench_train)
bench_app.command("knn")(bench.bench_knn)
bench_app.command("finetune")(bench.bench_finetune)
bench_app.command("ablate")(ablate.bench_ablate)
cache_app.command("info")(cache.cache_info)
cache_app.command("verify")(cache.cache_verify)
cache_app.command("export")(cache.cache_export)
cache_app.command("import")(cache.cache_import)


def main() -> None:
    """Run the command line and exit with its code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what batch systems send: the same as Ctrl-C
    _prepare_streams()
    limit_threads()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code, and says nothing
            _complain("interrupted; what was finished is kept", INTERRUPTED)
    except InputError as error:
        code = _complain(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _complain("interrupted; what was finished is kept", INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe left, as `head` does
        code = 1
    except OSError as error:
        if error.errno not in NO_FAULT_OF_OURS:
            raise
        code = _complain(f"{error.strerror}: {error.filename or 'while writing'}; what was finished is kept", 1)
    except Exception as error:
        # Typer keeps its usage errors in a private module; they all have a message and an exit code.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        code = _complain(f"{message().replace('Value error, ', '')} (see --help)", 2)
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


def _complain(line: str, code: int) -> int:
    from .pipeline.console import visible

    with contextlib.suppress(OSError):  # stderr may be what failed
        print(f"mmcli: {visible(' '.join(line.split()))}", file=sys.stderr, flush=True)
    return code
