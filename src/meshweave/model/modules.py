"""Which modules does a transformers model have? The generic adapter.

Nothing here knows an architecture: `get_image_features` runs encoder and projector, and the base model's own forward, given
encoder outputs computed elsewhere (`mm_encoder_outputs`), merges them, builds the position ids and runs the language model.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from meshweave.config import LANGUAGE
from meshweave.errors import LayoutError

VISION = "vision"
"""Name of the module that encodes images."""

_GIVEN = ("self", "pixel_values", "image_grid_thw")
"""What an image encoder may ask for."""


@dataclass(frozen=True)
class ModelGraph:
    """A transformers model, seen as modules."""

    model: PreTrainedModel
    children: dict[str, tuple[str, ...]]
    """Module name to the full names of the sub-modules it consists of."""

    def of_module(self, name: str) -> dict[str, nn.Module]:
        """Full name to sub-module, for one module."""
        return {child: self.model.get_submodule(child) for child in self.children[name]}

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Full name to parameter, for one module; tied parameters once."""
        prefixes = tuple(f"{child}." for child in self.children[name])
        return {key: value for key, value in self.model.named_parameters() if key.startswith(prefixes)}

    def blocks(self, name: str) -> list[nn.Module]:
        """The transformer blocks of one module, as transformers names their classes."""
        classes = self.model._no_split_modules or ()
        parts = [part for module in self.of_module(name).values() for part in module.modules()]
        lists = [part for part in parts if isinstance(part, nn.ModuleList)]
        # FSDP subclasses what it wraps.
        return [block for found in lists for block in found if any(kind.__name__ in classes for kind in type(block).__mro__)]


def graph_of(model: PreTrainedModel) -> ModelGraph:
    """Finds the modules of a transformers image-text model.

    Raises:
        LayoutError: the model has no separate encoder, or its encoders cannot be told apart.
    """
    base: Any = model.base_model
    where = f"{type(model).__name__}"
    if base is model or not hasattr(base, "language_model") or not hasattr(base, "get_image_features"):
        raise LayoutError(
            f"{where}: meshweave needs a model whose base has `language_model` and `get_image_features`; this one lacks them"
        )
    if hasattr(base, "get_audio_features"):
        raise LayoutError(f"{where} has several encoders, which is not built yet")
    if "mm_encoder_outputs" not in inspect.signature(type(base).forward).parameters:
        raise LayoutError(f"{where}: its forward does not accept encoder outputs computed elsewhere (`mm_encoder_outputs`)")
    needed = inspect.signature(base.get_image_features).parameters.values()
    lacking = [p.name for p in needed if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in _GIVEN]
    if lacking:
        raise LayoutError(f"{where}: its image encoder also wants {', '.join(lacking)}, which is not built yet")
    prefix = model.base_model_prefix
    names = [name for name, child in base.named_children() if name != "language_model" and _has_parameters(child)]
    heads = [name for name, child in model.named_children() if child is not base and _has_parameters(child)]
    graph = ModelGraph(
        model,
        {VISION: tuple(f"{prefix}.{name}" for name in names), LANGUAGE: (f"{prefix}.language_model", *heads)},
    )
    held = {name for module in graph.children for name in graph.parameters(module)}
    loose = sorted(set(model.state_dict(keep_vars=True)) - held - tied_names(model))
    if loose:
        raise LayoutError(f"{where}: {', '.join(loose)} belongs to no module, which is not built yet")
    return graph


def tied_names(model: PreTrainedModel) -> set[str]:
    """Second names of tied parameters: they are filled, and saved by transformers, under their first."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter to its first name: only tied ones have several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def media_widths(config: PreTrainedConfig) -> tuple[int, ...]:
    """Width of every tensor that belongs to one media token: its embedding, then any deepstack features."""
    deepstack = getattr(config.vision_config, "deepstack_visual_indexes", None) or ()
    return (config.get_text_config().hidden_size,) * (1 + len(deepstack))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
