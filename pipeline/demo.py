"""Every stage in turn on the generated miniature; each step names the command that does it alone."""

import hashlib
import json
import time
from collections.abc import Callable
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
from .core.config import Config, ModelConfig, load_config
from .core.console import metrics_table
from .core.device import pick_device
from .core.files import command, make_folder, one_line, remove_leftovers_of, write_folder, write_text
from .core.interrupts import interruptible
from .core.progress import Progress
from .core.results import read_codes
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
from .tagging.explain import show
from .tagging.tagger import Tagger
from .training.train_head import train_head

PATCHES = 64
EPOCHS = 100  # the miniature has 21 steps an epoch where COCO has 1,771
RECORD, RECORD_KEYS = "miniature.json", {"version", "seed", "whole", "files"}
FOLDERS = ("data", "data/annotations", "data/train2014", "data/val2014", "model", "store", "runs", "report")
Digests = dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The folder of a demo, its last table as rows, the files to open next with what they are, and the wall time."""

    out: Path
    rows: tuple[dict[str, Any], ...]
    files: tuple[tuple[Path, str], ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The rows of the last table and the wall time, as ``--json`` prints them."""
        return {"out": str(self.out), "seconds": self.seconds, "rows": list(self.rows)}

    def summary(self) -> list[RenderableType]:
        """What the command prints at its end."""
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
        config: The configuration, of which the hardware section (device, seed) is used.
        out: The folder to write.
        force: Generate the miniature again even if it is there.
        progress: Progress bars and messages; silent when not given.

    Raises:
        InputError: ``out`` holds files or links that are not a demo's.
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
    words = command("zero-shot", "--store", store, "--out", runs / "zero-shot")
    _step(progress, 4, "tag by the categories' names alone", words)
    shot = zero_shot(config, store=store, out=runs / "zero-shot", force=True, progress=progress)
    _step(
        progress,
        5,
        "train a 64-bit head from the store",
        command(
            *("train-head", "--store", store, "--preset", "small", "--bits", 64, "--epochs", EPOCHS, "--patience", 0),
            *("--out", runs / "head-64"),
        ),
    )
    training = {"training.num_epochs": EPOCHS, "training.early_stopping_patience": 0}
    kept = {"model": config.model, "hardware": config.hardware}
    config = load_config(options={"preset": "small", "hash.bits": 64, **training}).model_copy(update=kept)
    trained = train_head(config, store=store, out=runs / "head-64", force=True, progress=progress)
    _step(progress, 6, "let Hamming neighbours vote", command("knn-eval", "--run", trained.run.folder))
    voted = knn_eval(config, run=trained.run, progress=progress)
    _explain(config, trained.run, data, progress)
    rows = (shot.metrics, trained.metrics, voted.metrics)
    plan = ReportPlan(runs=runs, data=data, out=out / "report", force=True)
    _step(progress, 8, "one page of answers, tables, plots, queries and failures", plan.command)
    page = report(plan, progress).files[0]
    files = (
        (page, "one page of all of it, for any browser"),
        (voted.metrics_path, "every metric of the head: neighbours and classifier"),
        (trained.run.paths.history, "losses and val mAP of every epoch"),
        (out / "legend.png", "how the 80 categories are drawn"),
        (data / "val2014", "the pictures"),
    )
    return DemoResult(out=out, rows=rows, files=files, seconds=time.perf_counter() - started)


def _make_miniature(config: Config, out: Path, *, force: bool, progress: Progress) -> None:
    """Generate data set and checkpoint, unless the same ones are there already.

    ``miniature.json`` lists every generated file with its SHA-256: only these are ever replaced or removed, and only
    while they have that content. Runs stay: the demo replaces its own two, and others may be a user's.
    """
    _check_folder(out)
    record = _read_record(out)
    identity = {"version": __version__, "seed": config.hardware.seed}
    _step(progress, 1, "draw a small COCO and train a small SigLIP2 on it", None)
    if not force and record is not None and record == {**record, **identity, "whole": True}:
        progress.say(f"  already in {out} (--force makes it again)")
        return
    listed: Digests = {} if record is None else record["files"]
    remove_leftovers_of(out / RECORD)
    # Written first, so that the folder of an interrupted demo is known for one.
    write_text(out / RECORD, json.dumps({**identity, "whole": False, "files": listed}))
    generated: Digests = {}

    def generate(scratch: Path) -> None:
        _generate(config, scratch, progress, lambda: _check_overwritten(out, scratch, listed))
        generated.update({name: [_sha256(scratch / name)] for name in contents(scratch, lambda _: True).ours})
        either = {name: [*listed.get(name, []), *generated.get(name, [])] for name in {*listed, *generated}}
        write_text(out / RECORD, json.dumps({**identity, "whole": False, "files": either}))

    write_folder(out, generate, alone=True)
    with one_line(out):
        discard(out / "store")
        remove_files(out, contents(out, lambda name: name not in generated and _is_listed(out, name, listed)).ours)
    write_text(out / RECORD, json.dumps({**identity, "whole": True, "files": generated}))


def _check_folder(out: Path) -> None:
    """Refuse links, which lead to what is not the demo's, and a folder that holds files but no record of a demo."""
    links = [name for name in (*FOLDERS, RECORD, "legend.png") if (out / name).is_symlink()]
    is_foreign = _read_record(out) is None and any(path.name not in {LOCK, LOCK + SOFT} for path in out.iterdir())
    if links or is_foreign:
        raise InputError(
            "the folder is in use",
            where=out,
            got=f"a link, {links[0]}" if links else "files that are not a demo's",
            wanted="a new folder, or one of a demo",
            do="give another --out",
        )


def _generate(config: Config, folder: Path, progress: Progress, check: Callable[[], None]) -> None:
    """Draw the pictures, check what they would replace, and train the towers on them."""
    seed, device = config.hardware.seed, pick_device(config.hardware.device)
    draw_legend(folder / "legend.png")
    with progress.task("pictures", N_TRAIN + N_VAL + N_TEST) as task:
        make_dataset(folder / "data", seed=seed, progress=lambda _n, _total: task.advance(1))
    check()
    with progress.task("tower training", STEPS) as task:
        make_checkpoint(
            folder / "data",
            folder / "model",
            seed=seed,
            device=str(device),
            progress=lambda _n, _total, loss: task.advance(1, f"loss {loss:.3f}"),
        )
    check()


def _check_overwritten(out: Path, scratch: Path, listed: Digests) -> None:
    """Refuse to replace a file that the miniature did not write."""
    for name in contents(scratch, lambda _: True).ours:
        path = out / name
        if (path.exists() or path.is_symlink()) and not _is_listed(out, name, listed):
            raise InputError(
                "will not replace what mmcli did not write",
                where=path,
                got="a file that is not the miniature's, or was changed since",
                do="move it away, or give another --out",
            )


def _is_listed(out: Path, name: str, listed: Digests) -> bool:
    """Whether a file is a regular one with the content that the record lists."""
    path = out / name
    return name in listed and path.is_file() and not path.is_symlink() and _sha256(path) in listed[name]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_record(out: Path) -> dict[str, Any] | None:
    """The record of a demo's miniature; None where there is none, or another file of that name."""
    path = out / RECORD
    try:
        record = parse_json(path.read_bytes()) if path.is_file() else None  # a FIFO would be waited for without end
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not {"version", "seed", "whole"} <= record.keys() <= RECORD_KEYS:
        return None
    files = record.get("files")
    sound = isinstance(files, dict) and all(isinstance(digests, list) for digests in files.values())
    return record | {"files": files if sound else {}}


def _step(progress: Progress, number: int, what: str, line: str | None) -> None:
    """Show a heading, and the command that does this step alone."""
    progress.show(Text.assemble(f"\n{number}. ", (what, "bold")))
    if line is not None:
        progress.show(Text(f"   $ {line}", "cyan"))


def _explain(config: Config, run: Run, data: Path, progress: Progress) -> None:
    """Show the test image with several tags that the classifier is surest of, and the neighbours that voted."""
    query, manifest = read_codes(run.folder, "test"), read_manifest(data / "manifest.parquet")
    assert query.logits is not None
    loss = np.logaddexp(0, query.logits).sum(1) - (query.logits * query.labels).sum(1)
    row = int(np.argmin(np.where(query.labels.sum(1) >= 2, loss, np.inf)))
    listed = manifest.image_ids.tolist().index(query.image_id[row])
    image, caption = str(data / manifest.paths[listed]), manifest.first_captions[listed]
    words = command("predict", image, "--caption", caption, "--run", run.folder, "--data", data)
    _step(progress, 7, "ask why: one test image and the neighbours that voted", words)
    (tagging,) = Tagger.load(run.folder, device=config.hardware.device).predict([image], [caption])
    progress.show(show(tagging, truth=[manifest.category_names[c] for c in np.flatnonzero(query.labels[row])]))
