"""What an ablation is resolved against: a configuration file, options, a store; read once, then asked for every row.

Nothing here imports torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ... import InputError
from ...cache import FORMAT_VERSION, Store
from ..core.config import Config, ModelConfig, load_config, read_sections
from ..data.manifest import read_manifest
from ..evaluation.prompts import TEMPLATES
from .identity import flatten
from .plan import Base


@dataclass(frozen=True, kw_only=True)
class Told:
    """The configuration as it was given: a file, and options over it.

    Attributes:
        file: A YAML file, or None.
        options: Dotted keys to values.
        flags: Dotted keys to the names of options, for messages.
        tree: Sections under both, as those of a grid's file.
    """

    file: Path | None = None
    options: Mapping[str, Any]
    flags: Mapping[str, str]
    tree: Mapping[str, Any]

    def resolve(self, settings: Mapping[str, Any]) -> Config:
        """The configuration with some keys over everything that was given.

        Raises:
            InputError: It does not resolve.
        """
        return load_config(options={**self.flat, **self.options, **settings}, flags=self.flags)

    @property
    def flat(self) -> dict[str, Any]:
        """Dotted keys of the files."""
        return {**flatten(self.tree), **_flat_file(self.file)}


def make_base(told: Told, store: Path) -> Base:
    """Check what was given, once and with the file's name in messages, and look at the store.

    Args:
        told: The configuration.
        store: The store that rows are of, unless they name another patch budget.

    Raises:
        InputError: The configuration or the store is not usable.
    """
    if told.file is not None:
        load_config(told.file, options=told.options, flags=told.flags)
    frozen = replace(told, file=None, tree=told.flat)
    config, key, extra = frozen.resolve({}), Store.open(store).key, Store.open(store).extra
    given, budget = config.model.model_fields_set, config.model.max_num_patches
    if "max_num_patches" in given and budget != key.patches and "imported" not in extra:
        raise InputError(
            "a store of another budget", where=store, got=f"{key.patches} patches", wanted=f"{budget}",
            do="name another --store, or leave model.max_num_patches out: experiment B3 varies it",
        )  # fmt: skip

    def digest(patches: int, **others: Any) -> str:  # noqa: ANN401
        if (patches != key.patches or others) and "imported" in extra:
            raise InputError(
                "no images and towers behind this store", where=store, got="a store that was imported",
                wanted="one of `mmcli extract`", do="leave experiments with patches and towers out",
            )  # fmt: skip
        return replace(key, patches=patches, **others).digest

    return Base(
        resolve=frozen.resolve, store_digest=digest, patches=key.patches, prompts=TEMPLATES,
        images_digest=lambda patches: digest(
            patches, dtype="float32", compute_dtype="float32", processor=_own_processor(key.processor),
            format_version=FORMAT_VERSION,
        ),
    )  # fmt: skip


def model_of(store: Store, config: Config, patches: int) -> ModelConfig:
    """The checkpoint of a store, where another path to it was not given, at a patch budget."""
    key, given = store.key, "siglip2_variant" in config.model.model_fields_set
    return ModelConfig(
        siglip2_variant=config.model.siglip2_variant if given else str(store.extra.get("model_path", key.model)),
        revision=config.model.revision or key.commit,
        max_num_patches=patches, text_max_length=key.text_length,
    )  # fmt: skip


def check_source(store: Store, data: Path, model: ModelConfig) -> None:
    """Refuse to train towers on other images, or from another checkpoint, than those of the store that rows are of.

    Raises:
        InputError: The manifest below ``data``, or the local checkpoint, is another one.
    """
    from ..extraction.siglip import local_digest
    from ..finetuning.setup import MANIFEST

    key, name = store.key, Path(model.siglip2_variant)
    found = read_manifest(data / MANIFEST).sha256
    if found != key.manifest_sha256:
        raise InputError(
            "another data set than the store's", where=data, got=f"manifest {found[:12]}",
            wanted=f"manifest {key.manifest_sha256[:12]}",
            do="name the data set's folder with --data, or another --store",
        )  # fmt: skip
    own = key.revision.startswith("sha256:")
    if own and (not name.is_dir() or local_digest(name) != key.revision):
        raise InputError(
            "another checkpoint than the store's", where=model.siglip2_variant, got="other weights or settings",
            wanted=f"{key.model} at {key.revision[:19]}", do="name the store's checkpoint with --model",
        )  # fmt: skip
    if not own and (model.siglip2_variant, model.revision) != (key.model, key.revision):
        raise InputError(
            "another checkpoint than the store's", where=model.siglip2_variant, got=f"revision {model.revision}",
            wanted=f"{key.model} at {key.revision[:19]}", do="leave --model and model.revision out",
        )  # fmt: skip


def _own_processor(processor: str) -> str:
    """The checkpoint's settings of a store whose images may have been resized otherwise: finetuning does not."""
    settings = json.loads(processor)
    settings.pop("resizer", None)
    return json.dumps(settings, sort_keys=True)


def _flat_file(file: Path | None) -> dict[str, Any]:
    return {} if file is None else flatten(read_sections(file))
