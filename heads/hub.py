"""A head to and from a folder in the form of the Hugging Face hub: safetensors, ``config.json`` and a model card.

Beside :mod:`.tensor_files` the one module of this package that touches files: the hub's mixin has to be a base class
of what it saves. Numbers are
read from safetensors alone; a pickle is refused, never opened.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import InputError, first_line
from .card import CARD, card_fields
from .config import HeadKind, Section
from .tensor_files import load_tensors, write_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# What builds a head again; every other key of config.json is what is known about it.
BUILD = ("head", "width", "fusion", "hash", "classifier")
# What the hub finds a model by; the names of the mixin's classes are added to them.
LIBRARY, TAGS = "mmcli", ["multi-label-classification", "image-text", "hashing", "siglip2"]
Module = TypeVar("Module", bound="HubModule")


class HubModule(
    nn.Module,
    PyTorchModelHubMixin,
    library_name=LIBRARY,
    tags=TAGS,
    model_card_template=CARD,
):
    """What is loaded and saved: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

    Attributes:
        kind: Name of the head in a configuration.
        build: JSON that builds the head again: ``head``, ``width`` and the sections it was made with.
        about: What is known besides, JSON: preset, encoder, category names, metrics. Kept when saved and loaded.
    """

    kind: ClassVar[HeadKind]

    def __init__(self, width: int, **sections: Section) -> None:
        super().__init__()
        described = {name: section.model_dump(mode="json") for name, section in sections.items()}
        self.build: dict[str, Any] = {"head": self.kind, "width": width, **described}
        self.about: dict[str, Any] = {}

    @classmethod
    def from_build(cls, build: Mapping[str, Any]) -> Self:
        """Build a head, its parameters not filled, from the JSON of :attr:`build`.

        Raises:
            KeyError: A section is missing.
            ValueError: A section is refused.
        """
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **kwargs: Any) -> str | None:  # noqa: ANN401
        """Write ``model.safetensors``, ``config.json`` and, where there is none, the model card ``README.md``.

        Args:
            save_directory: The folder; made when absent.
            config: More to say about the head, over :attr:`about`.
            kwargs: Further arguments of ``huggingface_hub.ModelHubMixin.save_pretrained``.
        """
        about = {**self.about, **(config or {})}
        kwargs["model_card_kwargs"] = {**about, **(kwargs.get("model_card_kwargs") or {})}
        return super().save_pretrained(save_directory, config={**about, **self.build}, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_tensors(save_directory / WEIGHTS, _save_with_umask, tensors, {"format": "pt"})

    def generate_model_card(self, **kwargs: Any) -> ModelCard:  # noqa: ANN401
        """The card: what the head is, what it was trained on, its figures, how to load it, what it cannot do."""
        fields = card_fields({**self.build, **self.about, **kwargs}, sum(p.numel() for p in self.parameters()))
        tags = sorted([*TAGS, "model_hub_mixin", "pytorch_model_hub_mixin"])
        data = ModelCardData(library_name=LIBRARY, tags=tags, base_model=fields["base_model"])
        card: ModelCard = ModelCard.from_template(data, template_str=CARD, **fields)
        return card

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:  # noqa: ANN401
        """Load a head, in ``eval()`` mode.

        Args:
            pretrained_model_name_or_path: A folder written by :meth:`save_pretrained`, or a repository of the hub.
            kwargs: Further arguments of ``PyTorchModelHubMixin.from_pretrained``; ``map_location`` is the device.

        Raises:
            InputError: Nothing there, a pickle, a file that is damaged, or another kind of head.
        """
        try:
            loaded: Self = super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        except InputError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
            raise cannot_load(pretrained_model_name_or_path, error) from None
        return loaded

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str | torch.device = "cpu",
        config: object = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Self:
        if not isinstance(config, dict):
            raise InputError(
                "no head",
                where=model_id,
                got=f"no {CONFIG}",
                wanted="a folder that save_pretrained wrote",
                do="name a run folder's model/, or a repository of the hub",
            )
        if config.get("head", cls.kind) != cls.kind:
            raise InputError(
                "another kind of head",
                where=model_id,
                got=config["head"],
                wanted=cls.kind,
                do="load it with mmcli.load_head, which takes both",
            )
        file = _weights(model_id, {k: v for k, v in kwargs.items() if k not in BUILD and k != "strict"})
        head = restore(cls, config, load_tensors(file, str(map_location))[0])
        head.about = {key: value for key, value in config.items() if key not in BUILD}
        return head


def restore(cls: type[Module], build: Mapping[str, Any], state: Mapping[str, Tensor]) -> Module:
    """Build a head and give it the tensors, whose names, shapes and dtypes must be its own; ``eval()`` mode.

    Nothing is allocated for what does not fit, whatever sizes ``build`` asks for.

    Raises:
        KeyError: ``build`` lacks a section.
        ValueError: A section is refused, or a tensor is missing, left over, or not what the section says.
    """
    with torch.device("meta"):
        head = cls.from_build(build)
    wanted = head.state_dict()
    for name in [*wanted, *state]:
        if name not in state or name not in wanted:
            raise ValueError(f"{'no' if name in wanted else 'an unknown'} tensor {name}")
        expected, tensor = wanted[name], state[name]
        if (expected.shape, expected.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"tensor {name} is {_form(tensor)}, not {_form(expected)}")
    head.load_state_dict(dict(state), assign=True)
    for name, parameter in head.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"NaN or infinity in {name}")
    return head.eval()


def cannot_load(where: object, error: Exception) -> InputError:
    """The one line for whatever went wrong on the way to a head."""
    return InputError(
        "cannot load a head",
        where=where,
        got=reason(error),
        wanted="what mmcli wrote",
        do="copy it again, or train the head again with `mmcli train-head`",
    )


def reason(error: Exception) -> str:
    """What went wrong in one line: which key of which section, or the error's first line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{error.title}, {'.'.join(map(str, first['loc']))} {first['input']!r}: {first['msg']}"
    text = first_line(error)
    return f"no {text}" if isinstance(error, KeyError) else text


def refuse_pickle(where: object, name: str) -> InputError:
    """The error for a pickle file: opening one may run any code, so none is ever opened."""
    return InputError(
        "pickle files are refused",
        where=where,
        got=name,
        wanted="safetensors",
        do=f"ask for a folder with {WEIGHTS}",
    )


def _weights(model_id: str, kwargs: Mapping[str, Any]) -> Path:
    """The safetensors file of a folder or a repository."""
    folder = Path(model_id)
    if folder.is_dir():
        if (folder / WEIGHTS).is_file():
            return folder / WEIGHTS
        for path in sorted(folder.iterdir()):
            if path.suffix in PICKLES:
                raise refuse_pickle(folder, path.name)
    else:
        try:
            return Path(hf_hub_download(model_id, WEIGHTS, **kwargs))
        except EntryNotFoundError:
            pass
    raise InputError("no weights", where=model_id, got=f"no {WEIGHTS}", wanted="safetensors", do="save the head again")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` of a folder says.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"{CONFIG} holds a {type(config).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise cannot_load(folder / CONFIG, error) from None
    return config


def _save_with_umask(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors with the permissions of any new file; ``save_file`` lets the owner alone read what it writes."""
    path.write_bytes(save(tensors, metadata=metadata))
