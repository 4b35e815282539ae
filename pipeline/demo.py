"""Every stage in turn on the generated miniature; each step names the command that does it alone."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from .. import __version__
from ..cache.folder import discard
from ..cache.locks import SOFT
from ..cache.ownership import contents, remove_files
from ..cache.strict_json import parse_json
from ..errors import InputError
from ..heads.config import KnnConfig
from .core.config import Config, ModelConfig, load_config
from .core.console import metrics_table
from .core.device import pick_device
from .core.files import command, make_folder, one_line, write_text
from .core.interrupts import interruptible
from .core.progress import Progress
from .core.results import Codes, read_codes
from .core.run import Run
from .core.run_folders import LOCK, hold
from .data.manifest import read_manifest
from .data.miniature import N_TEST, N_TRAIN, N_VAL, draw_legend, make_dataset
from .data.prepare import prepare, statistics_tables
from .evaluation.knn_eval import knn_eval
from .evaluation.zero_shot import zero_shot
from .extraction.extract import ExtractPlan, extract
from .extraction.miniature_model import STEPS, make_checkpoint
from .report.report import ReportPlan, report
from .tagging.encode import Coded
from .tagging.explain import show
from .tagging.tagger import run_index
from .tagging.voting import Query, Voters
from .training.train_head import train_head

PATCHES = 64
EPOCHS = 100  # the miniature has 21 steps an epoch where COCO has 1,771
MARK = "miniature.json"
# Every file of the miniature, which the next demo throws away; whatever else lies there is somebody's own.
FILES = re.compile(
    r"""
    data/(dataset_coco\.json | manifest\.parquet)
    | data/annotations/instances_(train|val)2014\.json
    | data/(?P<folder>train|val)2014/COCO_(?P=folder)2014_[0-9]{12}\.jpg
    | model/(config | preprocessor_config | processor_config | tokenizer | tokenizer_config | special_tokens_map)\.json
    | model/model\.safetensors
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo made and measured."""

    out: Path
    rows: tuple[dict[str, Any], ...]
    files: tuple[tuple[Path, str], ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One JSON object: the rows of the last table and the wall time."""
        return {"out": str(self.out), "seconds": self.seconds, "rows": list(self.rows)}

    def summary(self) -> list[RenderableType]:
        """What a person reads at the end."""
        width = max(len(str(path)) for path, _ in self.files)
        lines = [f"  {path!s:<{width}}  {what}" for path, what in self.files]
        return [
            metrics_table(self.rows, f"The miniature's test split ({self.rows[0]['n_images']:.0f} images)"),
            f"\nAll of it in {self.seconds:.0f} s. Open next:",
            *lines,
            f"wrote {self.out}",
        ]


def run_demo(config: Config, *, out: Path, force: bool = False, progress: Progress | None = None) -> DemoResult:
    """Generate the miniature and run every stage on it.

    A miniature that is already in ``out``, made by the same version and seed, is used again.

    Args:
        config: Hardware section (device, seed) is used.
        out: The folder to write.
        force: Generate the miniature again in any case.
        progress: Who to tell.

    Raises:
        InputError: ``out`` holds files that are not a demo's.
    """
    make_folder(out)
    with hold(out, what="makes a demo there", keep=False), interruptible():
        return _run(config, out, force=force, progress=progress or Progress())


def _run(config: Config, out: Path, *, force: bool, progress: Progress) -> DemoResult:
    started = time.perf_counter()
    data, model, store, runs = out / "data", out / "model", out / "store", out / "runs"
    _make_miniature(config, out, force=force, progress=progress)
    _step(progress, 2, "read COCO's files, check them, write one manifest", command("prepare", "--data", data))
    for table in statistics_tables(prepare(data).statistics)[:1]:
        progress.show(table)
    words = command("extract", "--data", data, "--model", model, "--patches", PATCHES, "--out", store)
    _step(progress, 3, "run the frozen towers once, store raw embeddings", words)
    config = config.model_copy(update={"model": ModelConfig(siglip2_variant=str(model), max_num_patches=PATCHES)})
    extract(config, ExtractPlan(data=data, out=store), progress)
    _step(progress, 4, "tag by the categories' names alone", command("zero-shot", "--store", store))
    shot = zero_shot(config, store=store, out=runs / "zero-shot", force=True, progress=progress)
    _step(
        progress,
        5,
        "train a 64-bit head from the store",
        command("train-head", "--store", store, "--preset", "small", "--bits", 64, "--epochs", EPOCHS, "--patience", 0),
    )
    training = {"training.num_epochs": EPOCHS, "training.early_stopping_patience": 0}
    kept = {"model": config.model, "hardware": config.hardware}
    config = load_config(options={"preset": "small", "hash.bits": 64, **training}).model_copy(update=kept)
    trained = train_head(config, store=store, out=runs / "head-64", force=True, progress=progress)
    _step(progress, 6, "let Hamming neighbours vote", command("knn-eval", "--run", trained.run.folder))
    voted = knn_eval(config, run=trained.run, progress=progress)
    _explain(trained.run, data, config.knn, progress)
    rows = (shot.metrics, trained.metrics, voted.metrics)
    plan = ReportPlan(runs=runs, data=data, out=out / "report", force=True)
    _step(progress, 8, "one page of answers, tables, plots, queries and failures", plan.command)
    page = report(plan, progress).files[0]
    files = (
        (page, "one page of all of it, for any browser"),
        (voted.metrics_path, "every metric of the head: neighbours and classifier"),
        (trained.run.folder / "history.jsonl", "losses and val mAP of every epoch"),
        (out / "legend.png", "how the 80 categories are drawn"),
        (data / "val2014", "the pictures"),
    )
    return DemoResult(out=out, rows=rows, files=files, seconds=time.perf_counter() - started)


def _make_miniature(config: Config, out: Path, *, force: bool, progress: Progress) -> None:
    """Data set and checkpoint, unless the same ones are there already."""
    mark = out / MARK
    making = {"version": __version__, "seed": config.hardware.seed, "whole": False}
    made = _read_mark(mark)
    if made is None and any(path.name not in {LOCK, LOCK + SOFT} for path in out.iterdir()):
        raise InputError(
            "the folder is in use",
            where=out,
            got="files that are not a demo's",
            wanted="a new or empty folder",
            do="give another --out",
        )
    _step(progress, 1, "draw a small COCO and train a small SigLIP2 on it", None)
    if not force and made == {**making, "whole": True}:
        progress.say(f"  already in {out} (--force makes it again)")
        return
    # The mark comes first: from here on these three are the demo's, and may be thrown away by the next one. Runs stay:
    # the demo replaces its own two, and others may be somebody's.
    write_text(mark, json.dumps(making))
    with one_line(out):
        discard(out / "store")
        remove_files(out, contents(out, lambda name: FILES.fullmatch(name) is not None).ours)
    seed, device = config.hardware.seed, pick_device(config.hardware.device)
    draw_legend(out / "legend.png")
    with progress.task("pictures", N_TRAIN + N_VAL + N_TEST) as task:
        make_dataset(out / "data", seed=seed, progress=lambda _done, _total: task.advance(1))
    with progress.task("tower training", STEPS) as task:
        make_checkpoint(
            out / "data",
            out / "model",
            seed=seed,
            device=str(device),
            progress=lambda _done, _total, loss: task.advance(1, f"loss {loss:.3f}"),
        )
    write_text(mark, json.dumps({**making, "whole": True}))


def _read_mark(mark: Path) -> dict[str, object] | None:
    """What a demo's mark says; None where a file of that name is none."""
    try:
        made = parse_json(mark.read_bytes())
    except (OSError, ValueError):
        return None
    return made if isinstance(made, dict) and made.keys() == {"version", "seed", "whole"} else None


def _step(progress: Progress, number: int, what: str, line: str | None) -> None:
    """A heading, and the command that does this step alone."""
    progress.show(Text.assemble(f"\n{number}. ", (what, "bold")))
    if line is not None:
        progress.show(Text(f"   $ {line}", "cyan"))


def _explain(run: Run, data: Path, knn: KnnConfig, progress: Progress) -> None:
    """The test image with several tags that the classifier is surest of, and the neighbours that voted."""
    query, listing = read_codes(run.folder, "test"), read_manifest(data / "manifest.parquet")
    row = _telling_row(query)
    at = listing.image_ids.tolist().index(query.image_id[row])
    image, caption, one = str(data / listing.paths[at]), listing.captions[at][0], slice(row, row + 1)
    words = command("predict", image, "--caption", caption, "--run", run.folder, "--data", data)
    _step(progress, 7, "ask why: one test image and the neighbours that voted", words)
    coded = Coded(query.soft[one], None if query.packed is None else query.packed[one])
    (tagging,) = Voters(run_index(run), knn).tag(coded, [Query(image, caption)], top=knn.top_n_tags)
    progress.show(show(tagging, truth=[listing.category_names[c] for c in np.flatnonzero(query.labels[row])]))


def _telling_row(query: Codes) -> int:
    """The image with several tags whose classifier loss is the lowest."""
    assert query.logits is not None
    loss = np.logaddexp(0, query.logits).sum(1) - (query.logits * query.labels).sum(1)
    several = query.labels.sum(1) >= 2
    return int(np.argmin(np.where(several, loss, np.inf)))
