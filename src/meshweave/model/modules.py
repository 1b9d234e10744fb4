"""Which modules does a transformers model have, and how does each run? The generic adapter.

Nothing here knows an architecture: `get_image_features` runs encoder and projector, and the base model's own forward, given
encoder outputs computed elsewhere (`mm_encoder_outputs`), merges them, builds the position ids and runs the language model.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
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
        return [block for found in lists for block in found if type(block).__name__ in classes]


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


def media_widths(config: PreTrainedConfig) -> tuple[int, ...]:
    """Width of every tensor that belongs to one media token: its embedding, then any deepstack features."""
    deepstack = getattr(config.vision_config, "deepstack_visual_indexes", None) or ()
    return (config.get_text_config().hidden_size,) * (1 + len(deepstack))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class Encoder(nn.Module):
    """An encoder with its projector. State: the sub-modules of the transformers model, shared with it."""

    def __init__(self, graph: ModelGraph, name: str) -> None:
        super().__init__()
        for child, module in graph.of_module(name).items():
            self.add_module(child.rpartition(".")[2], module)
        # In a tuple, so that it is not registered as a child: FSDP shall see this module's parameters only.
        self._base: tuple[Any, ...] = (graph.model.base_model,)

    def forward(self, **inputs: Tensor) -> list[Tensor]:
        """Encodes media items.

        Args:
            inputs: what the model's image processor returns, items concatenated along dim 0.

        Returns:
            One or more tensors per media token, each `[tokens, hidden]`: the embeddings, then any deepstack features.
        """
        output = self._base[0].get_image_features(**inputs, return_dict=True)
        tensors = [torch.cat(tuple(output.pooler_output))]
        return tensors + [torch.cat(tuple(feature)) for feature in getattr(output, "deepstack_features", None) or ()]


class LanguageModel(nn.Module):
    """Embeddings, media merge, decoder, head and loss. State: the sub-modules of the transformers model, shared with it."""

    def __init__(self, graph: ModelGraph) -> None:
        super().__init__()
        for child, module in graph.of_module(LANGUAGE).items():
            self.add_module(child.rpartition(".")[2], module)
        base = graph.model.base_model
        self._base = (base,)
        self._head = (graph.model.get_output_embeddings(),)
        self._media_token: int = graph.model.config.image_token_id
        self._wants_grid = "mm_token_type_ids" in inspect.signature(type(base).forward).parameters

    def forward(
        self, input_ids: Tensor, labels: Tensor, media: Sequence[Tensor], grids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Runs one lane's microbatch.

        Args:
            input_ids: `[batch, length]`, padded on the right, media placeholders expanded.
            labels: `[batch, length]`, not shifted, -100 where nothing is predicted.
            media: per tensor of a media token `[tokens, hidden]`, in the order of the placeholders; empty without media.
            grids: `[items, 3]` patches of each item in time, height and width, for models whose position ids need it.

        Returns:
            Sum of the token losses (a scalar). Without gradients also, per sample, whether every target was the most likely
            token: `[batch]` bool.
        """
        extra: dict[str, object] = {}
        if media:
            embeddings, *deepstack = media
            encoded = SimpleNamespace(pooler_output=[embeddings], deepstack_features=[[feature] for feature in deepstack])
            extra["mm_encoder_outputs"] = {"image": encoded}
            if self._wants_grid:
                extra["image_grid_thw"] = grids
                extra["mm_token_type_ids"] = (input_ids == self._media_token).int()
        # No attention mask: padding is on the right, and a causal decoder never looks there.
        hidden = self._base[0](input_ids=input_ids, use_cache=False, **extra).last_hidden_state
        logits = self._head[0](hidden)
        return token_loss(logits, labels), None if torch.is_grad_enabled() else exact_samples(logits, labels)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of next tokens.

    Args:
        logits: `[batch, length, vocabulary]`.
        labels: `[batch, length]`, not shifted, -100 where nothing is predicted.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    # The labels are shifted, not the logits, which would copy the largest tensor of the step.
    target = functional.pad(labels[:, 1:], (0, 1), value=-100)
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")


def exact_samples(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples have every target as the most likely token, `[batch]` bool; arguments as for `token_loss`."""
    target = labels[:, 1:]
    return ((logits[:, :-1].argmax(-1) == target) | (target == -100)).all(-1)
