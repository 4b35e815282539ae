"""What an ablation is resolved against: a configuration file, options, a store; read once, then asked for every row.

Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .. import InputError
from ..cache import Store
from .ablate_planner import Base
from .config import Config, ModelConfig, load_config
from .identity import flatten
from .prompts import TEMPLATES


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
        images_digest=lambda patches: digest(patches, dtype="float32"),
    )  # fmt: skip


def model_of(store: Store, config: Config, patches: int) -> ModelConfig:
    """The checkpoint of a store, where another path to it was not given, at a patch budget."""
    key, given = store.key, "siglip2_variant" in config.model.model_fields_set
    return ModelConfig(
        siglip2_variant=config.model.siglip2_variant if given else str(store.extra.get("model_path", key.model)),
        revision=config.model.revision or (None if key.revision.startswith("sha256:") else key.revision),
        max_num_patches=patches, text_max_length=key.text_length,
    )  # fmt: skip


def _flat_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    return flatten(tree or {})
