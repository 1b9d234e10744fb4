"""How does one stage of the language model run on what this rank holds of a lane's sequences?"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from meshweave.batch.plan import MediaMeta
from meshweave.config import LANGUAGE
from meshweave.model.cut import Cut, Wire, stage_model
from meshweave.model.inputs import merge_inputs, merge_sounds, position_ids
from meshweave.model.loss import Words, mistakes, next_tokens, token_loss
from meshweave.model.modules import AUDIO, ModelGraph
from meshweave.model.routing import RoutingRecord
from meshweave.model.slicing import WHOLE_LANE, LanePart
from meshweave.sequence.grid import LaneGrid


class LanguageStage(nn.Module):
    """One (virtual) pipeline stage of the language model: embeddings and media merge on the first, head and loss on the last.

    State: sub-modules shared with the transformers model.
    """

    def __init__(self, graph: ModelGraph, blocks: range, part: LanePart = WHOLE_LANE) -> None:
        """Raises LayoutError: it is not known where the language model may be cut."""
        super().__init__()
        self.first = blocks.start == 0
        self.last = blocks.stop == len(graph.blocks(LANGUAGE))
        self.part = part
        self._wire = Wire()
        model = stage_model(graph, LANGUAGE, blocks, self._wire)
        for child in graph.children[LANGUAGE]:
            self.add_module(child.rpartition(".")[2], model.get_submodule(child))
        # In tuples, so that they are not registered as children: FSDP shall see this module's parameters only.
        self._base: tuple[Any, ...] = (model.base_model,)
        self._head: tuple[Any, ...] = (model.get_output_embeddings(),)
        self.routed = RoutingRecord(graph, blocks)
        self._anchor: Tensor | None = None
        self._sounds: tuple[Tensor, Tensor] | None = None
        if self.first:
            model.get_input_embeddings().register_forward_hook(self._embedded)
        tp, sliced = part.tp_group, part.rule.tp > 1
        # Of the whole model: a later stage has no embeddings to compare with.
        tied = self._head[0].weight is graph.model.get_input_embeddings().weight
        self._words: Words | None = None
        if sliced and not tied:
            assert tp is not None
            self._words = Words(tp, part.tp * -(-self._head[0].out_features // part.rule.tp))
        self._own_loss = sliced and tied
        self.loss_is_shared = tp is not None and not self._own_loss
        """Whether the ranks of `tp` all return the same loss; otherwise each returns that of its own tokens."""

    def forward(
        self,
        input_ids: Tensor,
        grid: LaneGrid,
        media: Mapping[str, Sequence[Tensor]] | None = None,
        items: Sequence[MediaMeta] = (),
        hidden: Tensor | None = None,
        labels: Tensor | None = None,
        sequence: Any = None,
        anchor: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Runs one lane's microbatch.

        Args:
            input_ids: `[rows, length]` of the whole lane, media placeholders expanded; on every stage, for position ids.
            grid: where its samples lie.
            media: first stage only; encoder to, per tensor of a media token, `[tokens, hidden]`, in the order of the
                placeholders that this rank embeds; without an encoder that has none there.
            items: the lane's media, in the order of the placeholders, for position ids; on every stage.
            hidden: `[rows, own columns, hidden]` from the stage before; None on the first.
            labels: last stage only; `[rows, length]` of the whole lane, not shifted, -100 where nothing is predicted.
            sequence: for attention over packed or cut sequences; None where rows hold one sample each.
            anchor: first stage only; an empty tensor that wants a gradient, if gradients shall flow back to the embeddings also
                where these are frozen and no media ask for them.

        Returns:
            The hidden state `[rows, own columns, hidden]`; of the last stage the sum of the token losses of the columns that this
            rank looks at (a scalar) and, without gradients, `[samples]` bool: whether every target of a sample was the most
            likely token.
        """
        base, media = self._base[0], media or {}
        held, own = self.part.held(grid), self.part.own(grid)
        ids = input_ids[:, own]
        extra = merge_inputs(base, ids, media)
        if (positions := self._positions(input_ids, grid, items)) is not None:
            extra["position_ids"] = positions[..., held]
        if sequence is not None:
            extra["sequence"] = sequence
        self._sounds = (ids, media[AUDIO][0]) if AUDIO in media else None
        self._wire.received = () if hidden is None else (hidden,)
        self._anchor = anchor
        self.routed.take()  # of a forward whose caller did not ask
        try:
            # No attention mask: padding is on the right, and a causal decoder never looks there.
            output = base(input_ids=ids, use_cache=False, **extra).last_hidden_state
        except Cut as cut:
            return cut.hidden
        finally:
            self._wire.received, self._sounds = (), None
        assert labels is not None
        logits = self._head[0](output)
        columns = own if self._own_loss else held
        targets = next_tokens(labels)[:, columns]
        loss = token_loss(logits, targets, self._words)
        if torch.is_grad_enabled():
            return loss, None
        wrong = _by_sample(mistakes(logits, targets, self._words), columns, grid)
        for group in (*self.part.cp_groups, *([self.part.tp_group] if self._own_loss else [])):
            dist.all_reduce(wrong, group=group)
        return loss, wrong == 0

    def _positions(self, input_ids: Tensor, grid: LaneGrid, items: Sequence[MediaMeta]) -> Tensor | None:
        """`[..., rows, length]`: every sample is counted from its start, whole; None where the model does so by itself."""
        samples = [input_ids[row, start:stop] for row, start, stop in grid.places] or [input_ids[0]]
        ids = pad_sequence(samples, batch_first=True)
        found = position_ids(self._base[0], ids, items)
        if not self.part.rule.packed:
            return found
        if found is None:
            found = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        positions = found.new_zeros(*found.shape[:-2], *input_ids.shape)
        for number, (row, start, stop) in enumerate(grid.places):
            positions[..., row, start:stop] = found[..., number, : stop - start]
        return positions

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor:
        if self._anchor is not None and not embeddings.requires_grad:
            embeddings = embeddings + self._anchor.sum()
        return embeddings if self._sounds is None else merge_sounds(self._base[0], self._sounds[0], embeddings, self._sounds[1])


def _by_sample(wrong: Tensor, columns: Tensor, grid: LaneGrid) -> Tensor:
    """`[samples]` how many of `wrong` `[rows, columns]` lie in each sample."""
    found = [wrong[row, (columns >= start) & (columns < stop)].sum() for row, start, stop in grid.places]
    return torch.stack(found) if found else wrong.new_zeros(0, dtype=torch.int64)
