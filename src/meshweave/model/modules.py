"""Which modules does a transformers model have? The generic adapter.

Nothing here knows an architecture: `get_image_features` and its like run encoder and projector, and the base model's own forward,
given encoder outputs computed elsewhere (`mm_encoder_outputs`), merges them, builds the position ids and runs the language model.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from meshweave.config import LANGUAGE
from meshweave.errors import LayoutError
from meshweave.model.getters import getter_of

VISION = "vision"
"""Name of the module that encodes images."""

AUDIO = "audio"
"""Name of the module that encodes sound."""


@dataclass(frozen=True)
class EncoderKind:
    """What transformers calls the things that belong to one encoder."""

    getter: str
    """Method of the base model that runs encoder and projector."""
    config: str
    """Key of its config in the model's."""
    given: tuple[str, ...]
    """What the getter may ask for, the media themselves first."""


ENCODERS = {
    VISION: EncoderKind(
        "get_image_features", "vision_config", ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids")
    ),
    AUDIO: EncoderKind("get_audio_features", "audio_config", ("input_features", "feature_attention_mask")),
}
"""Module name to how transformers' models run it; a model has some of these."""


@dataclass(frozen=True)
class MediaKind:
    """What transformers calls one kind of media."""

    module: str
    """The encoder that takes it."""
    token: str
    """Key of the model's config with the id of its placeholder."""
    type: int
    """Its number in `mm_token_type_ids`."""
    grid: str
    """What position ids call the sizes of its items."""


KINDS = {
    "image": MediaKind(VISION, "image_token_id", 1, "image_grid_thw"),
    "video": MediaKind(VISION, "video_token_id", 2, "video_grid_thw"),
    "audio": MediaKind(AUDIO, "audio_token_id", 3, "audio_feature_lengths"),
}
"""Kind to its names; in `mm_encoder_outputs` each is called what it is called here."""


TYPED = ("gemma3",)
"""`model_type`s whose `token_type_ids` tell tokens of media from text; PaliGemma's, for one, tell a question from its answer."""


def kinds_of(encoder: str) -> tuple[str, ...]:
    """What an encoder takes."""
    return tuple(kind for kind, names in KINDS.items() if names.module == encoder)


@dataclass(frozen=True)
class ModelGraph:
    """A transformers model, seen as modules."""

    model: PreTrainedModel
    children: dict[str, tuple[str, ...]]
    """Module name to the full names of the sub-modules it consists of."""
    loose: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Module name to the full names of parameters that it has beside these: the base model's own."""

    def of_module(self, name: str) -> dict[str, nn.Module]:
        """Full name to sub-module, for one module."""
        return {child: self.model.get_submodule(child) for child in self.children[name]}

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Full name to parameter, for one module; tied parameters once."""
        prefixes, loose = tuple(f"{child}." for child in self.children[name]), self.loose.get(name, ())
        return {key: value for key, value in self.model.named_parameters() if key.startswith(prefixes) or key in loose}

    def blocks(self, name: str) -> list[nn.Module]:
        """The transformer blocks of one module, as transformers names their classes."""
        classes = self.model._no_split_modules or ()
        parts = [part for module in self.of_module(name).values() for part in module.modules()]
        lists = [part for part in parts if isinstance(part, nn.ModuleList)]
        # FSDP subclasses what it wraps.
        return [block for found in lists for block in found if any(kind.__name__ in classes for kind in type(block).__mro__)]


def graph_of(model: PreTrainedModel) -> ModelGraph:
    """Finds the modules of a transformers model with encoders of images, of sound or of both, before a language model.

    Raises:
        LayoutError: the model has no separate encoder, or what an encoder needs is not known.
    """
    base: Any = model.base_model
    where = f"{type(model).__name__}"
    encoders = {} if base is model else _encoders(base)
    if not encoders or not hasattr(base, "language_model"):
        raise LayoutError(
            f"{where}: meshweave needs a model whose base has `language_model` and {' or '.join(_GETTERS)}; this one lacks them"
        )
    if VISION in encoders and "mm_encoder_outputs" not in inspect.signature(type(base).forward).parameters:
        raise LayoutError(f"{where}: its forward does not accept encoder outputs computed elsewhere (`mm_encoder_outputs`)")
    if "token_type_ids" in inspect.signature(type(base).forward).parameters and base.config.model_type not in TYPED:
        raise LayoutError(f"{where}: its forward wants `token_type_ids`, whose meaning is known for {', '.join(TYPED)} only")
    for name, getter in encoders.items():
        given = ("self", *ENCODERS[name].given)
        needed = inspect.signature(getter).parameters.values()
        lacking = [p.name for p in needed if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in given]
        if lacking:
            raise LayoutError(f"{where}: its {name} encoder also wants {', '.join(lacking)}, which is not built yet")
    prefix, first = model.base_model_prefix, next(iter(encoders))
    names = [name for name, child in base.named_children() if name != "language_model" and _has_parameters(child)]
    heads = [name for name, child in model.named_children() if child is not base and _has_parameters(child)]
    owner = {name: next((encoder for encoder in encoders if encoder in name), first) for name in names}
    children = {encoder: tuple(f"{prefix}.{name}" for name in names if owner[name] == encoder) for encoder in encoders}
    # What the base model itself owns (LLaVA-NeXT's `image_newline`) goes among media tokens.
    loose = {first: tuple(f"{prefix}.{name}" for name, _ in base.named_parameters(recurse=False))}
    graph = ModelGraph(model, {**children, LANGUAGE: (f"{prefix}.language_model", *heads)}, loose)
    held = {name for module in graph.children for name in graph.parameters(module)}
    held |= {
        f"{path}.{key}"
        for name in graph.children
        for path, part in graph.of_module(name).items()
        for key, _ in part.named_buffers()
    }
    lost = sorted(set(model.state_dict(keep_vars=True)) - held - tied_names(model))
    if lost:
        raise LayoutError(f"{where}: {', '.join(lost)} belongs to no module, which is not built yet")
    return graph


_GETTERS = tuple(f"`{kind.getter}`" for kind in ENCODERS.values())


def _encoders(base: Any) -> dict[str, Callable[..., Any]]:
    """Encoder to what runs it, without those that the config leaves out."""
    found = {name: getter_of(base, kind.getter) for name, kind in ENCODERS.items() if has_encoder(base.config, name)}
    return {name: getter for name, getter in found.items() if getter is not None}


def has_encoder(config: PreTrainedConfig, name: str) -> bool:
    """Whether a model's config describes this encoder."""
    return getattr(config, ENCODERS[name].config, None) is not None


def tied_names(model: PreTrainedModel) -> set[str]:
    """Second names of tied parameters: they are filled, and saved by transformers, under their first."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter to its first name: only tied ones have several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def module_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The part of a model's config that belongs to one module."""
    part: PreTrainedConfig = config.get_text_config() if name == LANGUAGE else getattr(config, ENCODERS[name].config)
    return part


def media_widths(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Encoder to the widths of the tensors that belong to one of its media tokens: the embedding, then any deepstack features."""
    widths = {}
    for name, kind in ENCODERS.items():
        deepstack = getattr(getattr(config, kind.config, None), "deepstack_visual_indexes", None) or ()
        widths[name] = (config.get_text_config().hidden_size,) * (1 + len(deepstack))
    return widths


def side_of(size: int | Sequence[int]) -> int:
    """The side of a square, which some configs give twice."""
    return size if isinstance(size, int) else size[0]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
