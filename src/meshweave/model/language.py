"""How does one stage of the language model run, and what is its loss?"""

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshweave.config import LANGUAGE
from meshweave.model.cut import Cut, Wire, stage_model
from meshweave.model.modules import ENCODERS, ModelGraph
from meshweave.model.routing import RoutingRecord


class LanguageStage(nn.Module):
    """One (virtual) pipeline stage of the language model: embeddings and media merge on the first, head and loss on the last.

    State: sub-modules shared with the transformers model.
    """

    def __init__(self, graph: ModelGraph, blocks: range) -> None:
        """Raises LayoutError: it is not known where the language model may be cut."""
        super().__init__()
        self.first = blocks.start == 0
        self.last = blocks.stop == len(graph.blocks(LANGUAGE))
        self._wire = Wire()
        model = stage_model(graph, LANGUAGE, blocks, self._wire)
        for child in graph.children[LANGUAGE]:
            self.add_module(child.rpartition(".")[2], model.get_submodule(child))
        # In tuples, so that they are not registered as children: FSDP shall see this module's parameters only.
        self._base: tuple[Any, ...] = (model.base_model,)
        self._head: tuple[Any, ...] = (model.get_output_embeddings(),)
        self.routed = RoutingRecord(graph, blocks)
        self._anchor: Tensor | None = None
        if self.first:
            model.get_input_embeddings().register_forward_hook(self._ask_for_gradients)
        self._media_token: int = model.config.image_token_id
        self._wants_types = "mm_token_type_ids" in inspect.signature(type(model.base_model).forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        media: Mapping[str, Sequence[Tensor]] | None = None,
        grids: Tensor | None = None,
        hidden: Tensor | None = None,
        labels: Tensor | None = None,
        anchor: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Runs one lane's microbatch.

        Args:
            input_ids: `[batch, length]`, padded on the right, media placeholders expanded; on every stage, for position ids.
            media: first stage only; encoder to, per tensor of a media token, `[tokens, hidden]`, in the order of the
                placeholders; without an encoder that has none.
            grids: `[items, 3]` patches of each item in time, height and width, for models whose position ids need it; on every
                stage.
            hidden: `[batch, length, hidden]` from the stage before; None on the first.
            labels: last stage only; `[batch, length]`, not shifted, -100 where nothing is predicted.
            anchor: first stage only; an empty tensor that wants a gradient, if gradients shall flow back to the embeddings also
                where these are frozen and no media ask for them.

        Returns:
            The hidden state `[batch, length, hidden]`; of the last stage the sum of the token losses (a scalar) and, without
            gradients, per sample, whether every target was the most likely token: `[batch]` bool.
        """
        extra: dict[str, object] = {}
        if media:
            extra["mm_encoder_outputs"] = {ENCODERS[name].output: _encoded(*tensors) for name, tensors in media.items()}
        if grids is not None and self._wants_types:
            extra["image_grid_thw"] = grids
        if self._wants_types:
            extra["mm_token_type_ids"] = (input_ids == self._media_token).int()
        self._wire.received = () if hidden is None else (hidden,)
        self._anchor = anchor
        self.routed.take()  # of a forward whose caller did not ask
        try:
            # No attention mask: padding is on the right, and a causal decoder never looks there.
            output = self._base[0](input_ids=input_ids, use_cache=False, **extra).last_hidden_state
        except Cut as cut:
            return cut.hidden
        finally:
            self._wire.received = ()
        assert labels is not None
        logits = self._head[0](output)
        return token_loss(logits, labels), None if torch.is_grad_enabled() else exact_samples(logits, labels)

    def _ask_for_gradients(self, module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor | None:
        if self._anchor is None or embeddings.requires_grad:
            return None
        return embeddings + self._anchor.sum()


def _encoded(embeddings: Tensor, *deepstack: Tensor) -> SimpleNamespace:
    """Encoder outputs, as the model's own getter would return them."""
    return SimpleNamespace(pooler_output=[embeddings], deepstack_features=[[feature] for feature in deepstack])


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
