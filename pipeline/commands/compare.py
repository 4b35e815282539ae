"""The command that sets two runs beside each other: compare."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Quiet, Split, finish


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="A run to compare it with; the same for two methods.", show_default=False)],
    method: Annotated[str | None, typer.Option("--method", help="Method of both: knn, classifier, zero-shot [default: knn where both have it, else classifier].")] = None,
    method_a: Annotated[str | None, typer.Option("--method-a", metavar="NAME", help="Method of RUN_A alone.")] = None,
    method_b: Annotated[str | None, typer.Option("--method-b", metavar="NAME", help="Method of RUN_B alone.")] = None,
    split: Split = "test", json_: Json = False, quiet: Quiet = False,  # noqa: ARG001
) -> None:  # fmt: skip
    """Is one run better than another? Paired bootstrap over the images that both scored."""
    from ..evaluation.compare import compare as stage

    result = stage(run_a, run_b, method_a=method_a or method, method_b=method_b or method, split=split)
    finish(result.to_json(), json_, *result.summary())
