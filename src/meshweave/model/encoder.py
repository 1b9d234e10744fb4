"""How does one stage of an encoder run, and what does it receive?"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from meshweave.batch.plan import MediaMeta
from meshweave.model.cut import Cut, Wire, stage_model
from meshweave.model.families import CUTS
from meshweave.model.families.plan import CutPlan
from meshweave.model.getters import getter_of
from meshweave.model.modules import ENCODERS, VISION, ModelGraph, media_widths, module_config, side_of


class EncoderStage(nn.Module):
    """One pipeline stage of an encoder; the last holds its projector. State: sub-modules shared with the transformers model."""

    def __init__(self, graph: ModelGraph, name: str, blocks: range) -> None:
        """Raises LayoutError: it is not known where the encoder may be cut."""
        super().__init__()
        self.first = blocks.start == 0
        self.last = blocks.stop == len(graph.blocks(name))
        self._wire = Wire()
        model = stage_model(graph, name, blocks, self._wire)
        for child in graph.children[name]:
            self.add_module(child.rpartition(".")[2], model.get_submodule(child))
        # In a tuple, so that it is not registered as a child: FSDP shall see this module's parameters only.
        self._name, self._kind = name, ENCODERS[name]
        self._base: tuple[Any, ...] = (model.base_model,)
        self._loose = [path.rpartition(".")[2] for path in graph.loose.get(name, ())] if self.last else []
        for key in self._loose:
            self.register_parameter(key, model.base_model.get_parameter(key))

    def forward(self, inputs: Mapping[str, Tensor], received: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Encodes media items.

        Args:
            inputs: what the model's processor returns, items concatenated along dim 0; later stages go without the media
                themselves.
            received: what the stage before returned; nothing for the first.

        Returns:
            Of the last stage one or more tensors per media token, each `[tokens, hidden]`: the embeddings, then any deepstack
            features. Of another the hidden state (`received_shapes`), then the features made so far.
        """
        self._wire.received = tuple(received)
        if not self.first:
            # Only looked at in passing, by what runs before the blocks; some count its dims.
            looked_at, media = received[0].detach(), self._kind.given[0]
            inputs = {media: looked_at[(..., *[None] * (4 - looked_at.ndim))], **inputs}
        base = self._base[0]
        for key in self._loose:
            # FSDP shards and gathers this module's parameters only.
            base._parameters[key] = self._parameters[key]
        try:
            output = self._getter()(**inputs, return_dict=True)
        except Cut as cut:
            return (cut.hidden, *self._wire.received[1:], *self._wire.made)
        finally:
            self._wire.received, self._wire.made = (), []
        features = getattr(output, "deepstack_features", None) or ()
        return tuple(_joined(tensors) for tensors in (output.pooler_output, *features))

    def sizes(self, items: Sequence[MediaMeta], device: torch.device) -> dict[str, Tensor]:
        """What a later stage is given in place of the media: their sizes, `[items, 3]` in patches or `[items, 2]` in pixels, a
        mask of frames, and blank media where their shape matters."""
        config = self._base[0].config
        wanted = inspect.signature(self._getter()).parameters
        sizes: dict[str, list[tuple[int, ...] | None]] = {
            "image_grid_thw": [item.grid for item in items],
            "image_sizes": [item.size for item in items],
        }
        found = {
            name: torch.tensor(values, device=device) for name, values in sizes.items() if name in wanted and None not in values
        }
        part = module_config(config, self._name)
        if not CUTS[part.model_type].shaped:
            return found
        dtype = self._base[0].dtype
        if self._name == VISION:
            height, width = found["image_sizes"].amax(dim=0).tolist()
            blank = torch.zeros(len(items), part.num_channels, height, width, dtype=dtype, device=device)
            return found | {self._kind.given[0]: blank}
        lengths = torch.tensor([item.grid for item in items], device=device)
        longest = 2 * part.max_source_positions if CUTS[part.model_type].hidden == "sounds" else int(lengths.max())
        blank = torch.zeros(len(items), part.num_mel_bins, longest, dtype=dtype, device=device)
        return {self._kind.given[0]: blank, "feature_attention_mask": (torch.arange(longest, device=device) < lengths).long()}

    def _getter(self) -> Callable[..., Any]:
        found = getter_of(self._base[0], self._kind.getter)
        assert found is not None  # graph_of has found it
        return found


def _joined(tokens: Tensor | Sequence[Tensor]) -> Tensor:
    """`[tokens, hidden]` of all items, which getters return in a list, in one tensor each, or in one tensor."""
    if isinstance(tokens, Tensor) and tokens.ndim == 2:
        return tokens
    return torch.cat([_joined(item) for item in tokens])


def received_shapes(
    config: PreTrainedConfig, encoder: str, blocks: range, items: Sequence[MediaMeta]
) -> tuple[tuple[int, ...], ...]:
    """Shapes of what the encoder stage of `blocks` receives from the one before it, for a pass over `items`.

    The hidden state has the shape that the family's `CutPlan` says; each deepstack feature is `[media tokens, hidden]`.
    """
    if blocks.start == 0:
        return ()
    vision = module_config(config, encoder)
    plan = CUTS[vision.model_type]
    hidden = (*_positions(plan, vision, items), vision.hidden_size)
    tapped = getattr(vision, plan.tapped) if plan.tapped else ()
    tokens = sum(item.tokens for item in items)
    widths = media_widths(config)[encoder][1:]
    return (hidden, *((tokens, width) for width, number in zip(widths, sorted(tapped), strict=True) if number < blocks.start))


def _positions(plan: CutPlan, config: Any, items: Sequence[MediaMeta]) -> tuple[int, ...]:
    """Shape of an encoder's hidden state, but for its width."""
    match plan.hidden:
        case "squares":
            positions = (side_of(config.image_size) // side_of(config.patch_size)) ** 2 + plan.extra_positions
            return sum(item.grid[0] if item.grid else 1 for item in items), positions
        case "sequence":
            return 1, sum(prod(side // config.patch_size for side in item.size or ()) for item in items)
        case "sounds":
            return len(items), config.max_source_positions
        case "frames":
            return (sum((item.grid[0] + 1) // 2 for item in items if item.grid),)
        case "tokens":
            return (sum(item.tokens for item in items),)
        case _:
            return (sum(prod(item.grid or ()) for item in items),)
