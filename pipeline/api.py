"""The Python twin of the command line: a function for every stage, with the defaults of its command.

``import mmcli`` gives all of them, lazily. A configuration is made by :func:`mmcli.load_config`; where none is given,
the defaults count, and what a run or a store knows. Progress is shown as the command line shows it.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.config import Config, load_config
from .core.defaults import DATA
from .core.progress import ConsoleProgress, Progress
from .core.run import Run, find_run

if TYPE_CHECKING:
    from .data.prepare import PrepareResult
    from .evaluation.compare import Comparison
    from .evaluation.knn_eval import KnnResult
    from .evaluation.zero_shot import ZeroShotResult
    from .extraction.extract import ExtractResult
    from .training.run import TrainResult

Folder = str | PathLike[str]


def prepare(
    source: Folder = DATA,
    out: Folder | None = None,
    *,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    **options: Any,  # noqa: ANN401
) -> "PrepareResult":
    """Turn a data set into a manifest, as ``mmcli prepare`` does.

    Args:
        source: A table, a folder, an instances JSON, an archive or a hub id; the folder of COCO 2014 by default.
        out: The folder that gets ``manifest.parquet``; the data folder by default.
        kind: What ``source`` is, where that is not recognised: the values of ``--format``.
        columns: Columns of a table by what they hold: ``path``, ``captions``, ``tags``, ``split``, ``image_id``.
        **options: Further fields of :class:`~mmcli.pipeline.data.sources.recognise.SourceOptions`, such as
            ``split_file`` or ``least_images``.

    Raises:
        InputError: Something is missing or wrong; the error says what to do.

    Example:
        >>> mmcli.prepare("photos.csv", columns={"tags": "keywords"}).path  # doctest: +SKIP
        PosixPath('manifest.parquet')
    """
    from .data.prepare import prepare_source
    from .data.sources.recognise import SourceOptions, recognise
    from .data.sources.tables import Columns

    chosen = Columns(**(columns or {}))
    return prepare_source(recognise(str(source), kind), SourceOptions(out=_path(out), columns=chosen, **options))


def extract(
    config: Config | None = None,
    *,
    data: Folder = DATA,
    quiet: bool = False,
    **options: Any,  # noqa: ANN401
) -> "ExtractResult":
    """Run the frozen towers once over a manifest into a store, as ``mmcli extract`` does.

    Args:
        config: The model, hardware and data sections are used.
        data: The data set's folder, with ``manifest.parquet``.
        quiet: Show no progress.
        **options: Fields of :class:`~mmcli.pipeline.extraction.extract.ExtractPlan`, such as ``out``, ``dtype`` or
            ``on_error``.

    Raises:
        InputError: A bad manifest, image or checkpoint, or another store in ``out``.

    Example:
        >>> config = mmcli.load_config(options={"model.max_num_patches": 256})  # doctest: +SKIP
        >>> store = mmcli.extract(config, data="data/coco").store  # doctest: +SKIP
    """
    from .extraction.extract import ExtractPlan
    from .extraction.extract import extract as stage

    for name in {"manifest", "out", "cache"} & options.keys():
        options[name] = _path(options[name])
    return stage(config or load_config(), ExtractPlan(data=Path(data), **options), _progress(quiet))


def train_head(
    config: Config | None = None,
    *,
    store: Folder | None = None,
    out: Folder | None = None,
    force: bool = False,
    quiet: bool = False,
) -> "TrainResult":
    """Train a head from a store, as ``mmcli train-head`` does.

    Args:
        config: Everything but the data section is used.
        store: The store's folder; the newest below ``data/cache`` by default.
        out: The run folder; a new one below ``runs`` by default.
        force: Replace an existing run in ``out``.
        quiet: Show no progress.

    Raises:
        InputError: A bad store, or a configuration that does not fit it.

    Example:
        >>> run = mmcli.train_head(mmcli.load_config(options={"hash.bits": 64})).run  # doctest: +SKIP
    """
    from .training.train_head import train_head as stage

    return stage(config or load_config(), store=_path(store), out=_path(out), force=force, progress=_progress(quiet))


def knn_eval(
    run: "Run | TrainResult | Folder | None" = None,
    config: Config | None = None,
    *,
    split: str = "test",
    quiet: bool = False,
) -> "KnnResult":
    """Let the neighbours of a run vote and measure them, as ``mmcli knn-eval`` does.

    Args:
        run: A run, its folder, or what :func:`train_head` gave; the newest below ``runs`` by default.
        config: The knn section and the device are used; the run's own configuration by default.
        split: The split whose images are tagged; an image never votes for itself.
        quiet: Show no progress.

    Raises:
        InputError: No such run, damaged codes, or more neighbours than codes.

    Example:
        >>> mmcli.knn_eval(run).metrics["mAP"]  # doctest: +SKIP
    """
    from .evaluation.knn_eval import knn_eval as stage

    chosen = _run(run)
    config = config or load_config(chosen.paths.config)
    return stage(config, run=chosen, split=split, progress=_progress(quiet))


def zero_shot(
    config: Config | None = None,
    *,
    store: Folder | None = None,
    quiet: bool = False,
    **options: Any,  # noqa: ANN401
) -> "ZeroShotResult":
    """Tag the images of a store by prompts, without training, as ``mmcli zero-shot`` does.

    Args:
        config: The model and hardware sections are used.
        store: The store's folder; the newest below ``data/cache`` by default.
        quiet: Show no progress.
        **options: Further options of :func:`mmcli.pipeline.evaluation.zero_shot.zero_shot`, such as ``inputs``.

    Raises:
        InputError: A bad store, or a checkpoint that did not make it.

    Example:
        >>> mmcli.zero_shot(store="demo/store").metrics["mAP"]  # doctest: +SKIP
    """
    from .evaluation.zero_shot import zero_shot as stage

    return stage(config or load_config(), store=_path(store), progress=_progress(quiet), **options)


def compare(run_a: Folder, run_b: Folder, *, method: str | None = None, split: str = "test") -> "Comparison":
    """Compare two runs on the same images by a paired bootstrap, as ``mmcli compare`` does.

    Args:
        run_a: The folder of a finished run.
        run_b: The folder of another.
        method: Whose scores: ``knn``, ``classifier``, ...; neighbours where both have them by default.
        split: The split whose images are compared.

    Raises:
        InputError: No such run, no such scores, or runs of other images.

    Example:
        >>> mmcli.compare("runs/a", "runs/b").figures  # doctest: +SKIP
    """
    from .evaluation.compare import compare as stage

    return stage(Path(run_a), Path(run_b), method_a=method, method_b=method, split=split)


def finetune(
    config: Config | None = None,
    *,
    data: Folder = DATA,
    quiet: bool = False,
    **options: Any,  # noqa: ANN401
) -> "TrainResult":
    """Train head and towers from the images, as ``mmcli finetune`` does.

    Args:
        config: Everything is used; its finetune section says what of the towers is trained.
        data: The data set's folder, with ``manifest.parquet``.
        quiet: Show no progress.
        **options: Further options of :func:`mmcli.pipeline.finetuning.finetune.finetune`, such as ``unfreeze``.

    Raises:
        InputError: A bad manifest, image or checkpoint, or keys that do not go together.

    Example:
        >>> mmcli.finetune(data="data/coco", unfreeze="last-2").run.folder  # doctest: +SKIP
    """
    from .finetuning.finetune import finetune as stage

    return stage(config or load_config(), data=Path(data), progress=_progress(quiet), **options)


def _progress(quiet: bool) -> Progress:
    return Progress.quiet() if quiet else ConsoleProgress()


def _path(folder: Folder | None) -> Path | None:
    return None if folder is None else Path(folder)


def _run(run: "Run | TrainResult | Folder | None") -> Run:
    """The run that was given, by its folder or as a result; the newest one by default."""
    if isinstance(run, Run):
        return run
    return find_run(_path(run)) if run is None or isinstance(run, str | PathLike) else run.run
