"""A SigLIP checkpoint's files: a folder, or one commit of a repository of the Hugging Face hub.

A branch or a tag is resolved to a commit once. Configuration, weights, image processor and tokenizer are then read from
the snapshot of that commit in the hub's cache, so that parts of two versions never mix.
"""

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, resolve_revision, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from safetensors import safe_open

from ...cache.strict_json import parse_json
from ...errors import InputError, first_line
from ..core.config import DEFAULT_MODEL, ModelConfig

COMMIT = re.compile("[0-9a-f]{40}")
SHORT_COMMIT = re.compile("[0-9a-f]{4,39}")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is read of a checkpoint; a repository may hold other formats of the same weights.
FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    WEIGHTS,
    "model-*.safetensors",
    INDEX,
)
FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that older versions of transformers saved; no number depends on them.
_HARMLESS = re.compile(r"(.*\.)?position_ids")
# What torch.compile, DistributedDataParallel and Lightning put before the names of parameters.
_PREFIXES = ("_orig_mod.", "module.", "model.")
# How transformers says what a part needs: the tokenizers of SigLIP 1 are SentencePiece's.
_MISSING_LIBRARY = re.compile(r"requires the (\w+) library")
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The files of one checkpoint.

    Attributes:
        name: The folder or the hub id, as the user gave it.
        folder: Where the files are: that folder, or the snapshot of a commit in the hub's cache.
        commit: The commit of a hub checkpoint, 40 hex digits; ``None`` for a folder.
    """

    name: str
    folder: Path
    commit: str | None

    def __str__(self) -> str:
        """The name of the checkpoint in messages, with its commit."""
        return self.name if self.commit is None else f"{self.name} at {self.commit}"

    def load(self, part: str, auto: Any, **options: object) -> Any:  # noqa: ANN401
        """Load one part through an Auto class of ``transformers``; no code of the checkpoint is ever run.

        Args:
            part: What is loaded, for the message.
            auto: The Auto class.
            options: Further arguments of ``from_pretrained``.

        Raises:
            InputError: The files cannot be read as that part.
        """
        silence_transformers()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return auto.from_pretrained(str(self.folder), trust_remote_code=False, **options)
        except (KeyboardInterrupt, SystemExit):
            raise
        # A checkpoint may hold anything: parsers raise whatever they like, and those in Rust panic outside Exception.
        except BaseException as error:
            library = _MISSING_LIBRARY.search(str(error)) if isinstance(error, ImportError) else None
            advice = None if library is None else f"install it: pip install {library[1].lower()}"
            raise self.refusal(f"cannot load {part} of the checkpoint", got=reason(error), do=advice) from error

    def load_weights(self, config: Any) -> Any:  # noqa: ANN401
        """Load the towers in float32; every tensor of theirs comes from the checkpoint.

        Args:
            config: The configuration, as :meth:`load` gives it.

        Returns:
            The model of ``transformers``, in ``eval()`` mode.

        Raises:
            InputError: Weights are damaged, pickled, missing, left over, of another shape or no floats.
        """
        tensors = self._tensors()
        self._check_layers(config, tensors)
        try:
            model, report = self.load(
                "the weights",
                transformers.AutoModel,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except InputError:
            self._refuse_shapes(config, tensors)
            raise
        self._check_report(model, report)
        return model

    def refusal(self, what: str, *, got: object, wanted: str | None = None, do: str | None = None) -> InputError:
        """The one line for a checkpoint that cannot be used."""
        mend = "check the folder" if self.commit is None else f"remove {self.folder} to download it again"
        return InputError(
            what,
            where=_printable(str(self)),
            got=got,
            wanted=wanted or "a SigLIP2 checkpoint with safetensors weights",
            do=do or f"{mend}, or name another checkpoint with --model or --revision",
        )

    def _tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor by name; empty where ``transformers`` looks for the weights elsewhere."""
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        single = self.folder / WEIGHTS
        paths = [single] if single.is_file() else sorted(self.folder.glob("model-*.safetensors"))
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        part = file.get_slice(name)
                        tensors[name] = (part.get_dtype(), tuple(part.get_shape()))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                raise self.refusal(
                    "cannot load the weights of the checkpoint", got=f"{path.name}: {_damage(path, error)}"
                ) from error
        odd = [name for name, (dtype, _) in tensors.items() if dtype not in FLOATS and not _HARMLESS.fullmatch(name)]
        if odd:
            raise self.refusal(
                "weights that are no floats",
                got=f"{tensors[odd[0]][0]} in {_some(odd)}",
                wanted="float32, float16 or bfloat16",
                do="use the checkpoint before it was quantised",
            )
        return tensors

    def _check_layers(self, config: Any, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:  # noqa: ANN401
        """Refuse more layers than there are tensors before a model of so many is built."""
        counts = (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers)
        if tensors and sum(counts) > len(tensors):
            raise self.refusal(
                "weights of fewer layers",
                got=f"{len(tensors):,} tensors",
                wanted=f"{sum(counts):,} layers, as in config.json",
            )

    def _refuse_shapes(self, config: Any, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:  # noqa: ANN401
        """Name the tensors of another shape than the configuration asks for, if that is why loading failed."""
        try:
            with torch.device("meta"):
                wanted = transformers.AutoModel.from_config(config, trust_remote_code=False).state_dict()
        except Exception:  # noqa: BLE001 - the reason why no model can be built was met before
            return
        other = [name for name, (_, shape) in tensors.items() if name in wanted and tuple(wanted[name].shape) != shape]
        if other:
            shapes = f"{list(tensors[other[0]][1])}, where config.json says {list(wanted[other[0]].shape)}"
            raise self.refusal(
                "weights of another shape than the configuration's",
                got=f"{_some(other)}: {shapes}",
                wanted="weights and config.json of one checkpoint",
            )

    def _check_report(self, model: Any, report: dict[str, Any]) -> None:  # noqa: ANN401
        """Refuse towers that are not wholly, or not only, what the checkpoint holds."""
        missing = sorted(name for name in report["missing_keys"] if not _HARMLESS.fullmatch(name))
        parts = dict(model.named_children()) | dict(model.named_parameters(recurse=False))
        extra = sorted(
            name
            for name in report["unexpected_keys"]
            if not _HARMLESS.fullmatch(name) and (missing or name.partition(".")[0] in parts)
        )
        other = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
        problems = [
            f"{len(names):,} {what} ({_some(names)})"
            for names, what in ((missing, "missing"), (extra, "unknown"), (other, "of another shape"))
            if names
        ]
        problems += [reason(error) for error in report.get("error_msgs", ())[:1]]
        if not problems:
            return
        prefix = next((prefix for prefix in _PREFIXES if extra and all(n.startswith(prefix) for n in extra)), None)
        advice = None
        if prefix is not None:
            advice = (
                f'its names begin with "{prefix}", as those of a compiled or wrapped model do:'
                " save the inner model again with save_pretrained"
            )
        raise self.refusal(
            "weights that are not the towers'",
            got=f"tensors {', '.join(problems)}",
            wanted="every tensor of both towers, and no other",
            do=advice,
        )


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """Find a checkpoint; one of the hub is downloaded to the hub's cache where it is not there yet.

    Args:
        name: A folder in ``save_pretrained`` form, or a hub id.
        revision: Branch, tag or commit (the first digits will do) of a hub checkpoint; ``main`` when not given.

    Raises:
        InputError: No such folder or repository, a revision that a folder cannot have, or neither network nor cache.
    """
    if _is_folder(name):
        if revision is not None:
            raise InputError(
                "a folder has no revisions",
                where=_printable(name),
                got=f"--revision {revision}",
                wanted="a hub id with a revision, or a folder without",
                do="leave --revision out, or give --model a hub id",
            )
        return ModelSource(name=name, folder=Path(name), commit=None)
    commit = find_commit(name, revision)
    assert commit is not None
    return ModelSource(name=name, folder=_snapshot(name, commit), commit=commit)


def find_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a hub checkpoint; ``None`` for a folder. Arguments and errors are those of :func:`find_model`."""
    if _is_folder(name):
        return None
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise InputError(
            "no checkpoint",
            where=_printable(name),
            got="no such folder",
            wanted="a folder or a hub id like owner/name",
            do=f"give --model a folder or a hub id such as {DEFAULT_MODEL}",
        )
    silence_transformers()
    try:
        commit = resolve_revision(name, revision=revision).resolved
    except Exception as error:
        cached = _commit_in_cache(name, revision or "")
        if cached is None:
            raise _unavailable(name, revision, error) from error
        commit = cached
    if not COMMIT.fullmatch(commit):
        raise InputError(
            "a damaged cache of the hub",
            where=constants.HF_HUB_CACHE,
            got=f"{commit[:60]!r} for {name}",
            wanted="a commit of 40 hex digits",
            do="remove the folder of this model there, and run again",
        )
    return commit


def pin_revision(model: ModelConfig) -> ModelConfig:
    """The same checkpoint at one commit, for processes that load it one by one; a folder stays as it is."""
    commit = find_commit(model.siglip2_variant, model.revision)
    return model if commit is None else model.model_copy(update={"revision": commit})


def silence_transformers() -> None:
    """Keep loaders from writing: what goes wrong ends in one line of ours, which says it all."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def reason(error: object) -> str:
    """The first line of an error as it stands inside a line of ours."""
    return _printable(first_line(error)[:200].rstrip(". "))


def _snapshot(name: str, commit: str) -> Path:
    """The folder of a commit in the hub's cache, with what is read of it; asks the hub only for what is not there."""
    try:
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=list(FILES), local_files_only=True))
        if _is_whole(folder):
            return folder
    except (OSError, ValueError):  # not there, or not all of it
        pass
    # Hundreds of megabytes take their time: on a terminal a progress bar shows them.
    shows = sys.stderr.isatty() and not constants.HF_HUB_DISABLE_PROGRESS_BARS
    try:
        if shows:
            transformers.logging.enable_progress_bar()
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(FILES)))
    except Exception as error:
        raise _unavailable(name, commit, error) from error
    finally:
        if shows:
            transformers.logging.disable_progress_bar()


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has every file that a checkpoint needs; what a commit holds never changes."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    weights = {WEIGHTS}
    if INDEX in names and WEIGHTS not in names:
        try:
            weights = set(parse_json((folder / INDEX).read_bytes())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False
    needed = {"config.json", "preprocessor_config.json", "tokenizer_config.json", *weights}
    return needed <= names and any(name == "tokenizer.json" or name.endswith(".model") for name in names)


def _commit_in_cache(name: str, start: str) -> str | None:
    """The one cached commit of a checkpoint that begins with these digits."""
    if not SHORT_COMMIT.fullmatch(start):
        return None
    try:
        repos = [
            repo
            for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos
            if (repo.repo_type, repo.repo_id) == ("model", name)
        ]
    except (CacheNotFound, OSError, ValueError):
        return None
    hashes = [revision.commit_hash for repo in repos for revision in repo.revisions]
    commits = [commit for commit in hashes if commit.startswith(start)]
    return commits[0] if len(commits) == 1 else None


def _unavailable(name: str, revision: str | None, error: Exception) -> InputError:
    """The one line for a checkpoint that the hub, or its cache, does not give."""
    asked = name if revision is None else f"{name} at {revision}"
    got, do = f"no such folder, and from the hub: {reason(error)}", "check --model, --revision and the network"
    if isinstance(error, GatedRepoError):
        got = "a gated repository that your account may not read"
        do = f"accept its terms at {constants.ENDPOINT}/{name} and log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        got = "no such folder, and no repository of that name on the hub that your account may read"
        do = f"check the spelling (the default is {DEFAULT_MODEL}); for a private one log in with `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        got, do = "no such revision on the hub", "give --revision a branch, a tag or a commit of this repository"
    elif isinstance(error, IncompleteSnapshotError):
        got = f"a download that was interrupted, and no network: {reason(error)}"
        do = "run again with network access, or give --model a folder"
    elif isinstance(error, RevisionResolutionError | LocalEntryNotFoundError):
        got = f"no such folder, not in the hub's cache {constants.HF_HUB_CACHE}, and the hub cannot be reached"
        do = "unset HF_HUB_OFFLINE, " if constants.is_offline_mode() else ""
        do += "connect to the network and run again, set HF_HOME to a cache that has it, or give --model a folder"
    return InputError("cannot get the checkpoint", where=_printable(asked), got=got, do=do)


def _is_folder(name: str) -> bool:
    try:
        folder = Path(name)
        if not folder.is_dir():
            return False
        str(folder.resolve()).encode()
    except UnicodeEncodeError:
        raise InputError(
            "a folder whose name is not UTF-8",
            where=_printable(str(folder.resolve())),
            wanted="a path that every reader of weights can open",
            do="rename the folder, or make a link with another name",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError("no checkpoint", where=_printable(name), got=reason(error)) from None
    return True


def _damage(path: Path, error: BaseException) -> str:
    """Why a file of weights cannot be read."""
    try:
        with path.open("rb") as stream:
            start = stream.read(40)
    except OSError as unreadable:
        return unreadable.strerror or str(unreadable)
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights: run `git lfs pull`"
    return f"a damaged or partial file ({reason(error)})"


def _some(names: Sequence[str]) -> str:
    """A few names of many."""
    return _printable(", ".join(name[:60] for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else ""))


def _printable(text: str) -> str:
    """Text that any stream takes: bytes of a path that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
