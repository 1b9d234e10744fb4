"""How does one stage of the language model run, and what is its loss?"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshweave.batch import MediaMeta
from meshweave.config import LANGUAGE
from meshweave.model.cut import Cut, Wire, stage_model
from meshweave.model.inputs import merge_inputs, merge_sounds, position_ids
from meshweave.model.modules import AUDIO, ModelGraph


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
        self._backward = False
        self._sounds: tuple[Tensor, Tensor] | None = None
        if self.first:
            model.get_input_embeddings().register_forward_hook(self._embedded)

    def forward(
        self,
        input_ids: Tensor,
        media: Mapping[str, Sequence[Tensor]] | None = None,
        items: Sequence[MediaMeta] = (),
        hidden: Tensor | None = None,
        labels: Tensor | None = None,
        backward: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Runs one lane's microbatch.

        Args:
            input_ids: `[batch, length]`, padded on the right, media placeholders expanded; on every stage, for position ids.
            media: first stage only; encoder to, per tensor of a media token, `[tokens, hidden]`, in the order of the
                placeholders; without an encoder that has none.
            items: the media of these samples, in the order of the placeholders, for position ids; on every stage.
            hidden: `[batch, length, hidden]` from the stage before; None on the first.
            labels: last stage only; `[batch, length]`, not shifted, -100 where nothing is predicted.
            backward: first stage only; whether gradients flow back to the embeddings, also where these are frozen and no media
                ask for them.

        Returns:
            The hidden state `[batch, length, hidden]`; of the last stage the sum of the token losses (a scalar) and, without
            gradients, per sample, whether every target was the most likely token: `[batch]` bool.
        """
        base, media = self._base[0], media or {}
        extra = merge_inputs(base, input_ids, media)
        if (positions := position_ids(base, input_ids, items)) is not None:
            extra["position_ids"] = positions
        self._sounds = (input_ids, media[AUDIO][0]) if AUDIO in media else None
        self._wire.received = () if hidden is None else (hidden,)
        self._backward = backward and torch.is_grad_enabled()
        try:
            # No attention mask: padding is on the right, and a causal decoder never looks there.
            output = base(input_ids=input_ids, use_cache=False, **extra).last_hidden_state
        except Cut as cut:
            return cut.hidden
        finally:
            self._wire.received, self._sounds = (), None
        assert labels is not None
        logits = self._head[0](output)
        return token_loss(logits, labels), None if torch.is_grad_enabled() else exact_samples(logits, labels)

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor:
        if self._backward:
            embeddings.requires_grad_()
        return embeddings if self._sounds is None else merge_sounds(self._base[0], self._sounds[0], embeddings, self._sounds[1])


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
