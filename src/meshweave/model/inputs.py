"""What does a model's base forward want beside embeddings and media?

Position ids follow from the whole sequence; all else follows from any slice of it and the media tokens that fall in there.
"""

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from meshweave.batch.plan import MediaMeta
from meshweave.model.modules import AUDIO, KINDS, kinds_of


def position_ids(base: Any, input_ids: Tensor, items: Sequence[MediaMeta]) -> Tensor | None:
    """Position ids of a whole microbatch, by the model's own rule.

    Args:
        base: the base model (`model.base_model`), whole or one stage of it.
        input_ids: `[rows, length]`, not sliced, padded on the right, media placeholders expanded.
        items: the media of these rows; those of one kind in the order of their placeholders.

    Returns:
        `[3, rows, length]` for models that count time, height and width (M-RoPE); None where positions ascend from 0 in each row.
    """
    if not hasattr(base, "compute_3d_position_ids"):
        return None
    grids = {
        KINDS[kind].grid: torch.tensor([item.grid for item in items if item.kind == kind], device=input_ids.device)
        for kind in {item.kind for item in items}
    }
    if "audio_feature_lengths" in grids:
        grids["audio_feature_lengths"] = grids["audio_feature_lengths"].flatten()
    given = grids | {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": _types(base, input_ids),
    }
    wanted = inspect.signature(base.compute_3d_position_ids).parameters
    found: Tensor | None = base.compute_3d_position_ids(**{name: given.get(name) for name in wanted})
    if found is None:  # text alone
        rows, length = input_ids.shape
        return torch.arange(length, device=input_ids.device).expand(3, rows, length)
    return found.to(input_ids.device)


def merge_inputs(base: Any, input_ids: Tensor, media: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """What the base forward takes to put media tokens into a (slice of a) sequence, and to tell tokens of media from text.

    Args:
        base: as for `position_ids`.
        input_ids: `[rows, length]`, any slice of the sequence.
        media: encoder to, per tensor of a media token, `[tokens, hidden]`: those that fall in this slice, in the order of their
            placeholders; empty after the first pipeline stage, and without an encoder that has none.

    Returns:
        Arguments of the base forward. Sound is not among them: `merge_sounds` writes it.
    """
    wanted = inspect.signature(type(base).forward).parameters
    extra: dict[str, Any] = {name: _types(base, input_ids) for name in ("mm_token_type_ids", "token_type_ids") if name in wanted}
    outputs = {
        kind: _Encoded(*parts)
        for encoder, tensors in media.items()
        if encoder != AUDIO
        for kind, parts in _by_kind(base, input_ids, encoder, tensors).items()
    }
    return extra | ({"mm_encoder_outputs": outputs} if outputs else {})


def merge_sounds(base: Any, input_ids: Tensor, embeddings: Tensor, sounds: Tensor) -> Tensor:
    """Embeddings with the tokens of sounds in their places: no model's forward takes these as `mm_encoder_outputs`.

    Args:
        base, input_ids: as for `merge_inputs`.
        embeddings: `[rows, length, hidden]` of the same slice.
        sounds: `[tokens, hidden]` that fall in it.
    """
    places = input_ids == getattr(base.config, KINDS["audio"].token)
    return embeddings.masked_scatter(places.unsqueeze(-1), sounds.to(embeddings.dtype))


def _types(base: Any, input_ids: Tensor) -> Tensor:
    """`[rows, length]` int32: 0 for text, and what transformers' processors write for each kind of media."""
    types = torch.zeros_like(input_ids, dtype=torch.int32)
    for kind in KINDS.values():
        if (token := getattr(base.config, kind.token, None)) is not None:
            types[input_ids == token] = kind.type
    return types


def _by_kind(base: Any, input_ids: Tensor, encoder: str, tensors: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Kind to an encoder's tokens of that kind, without kinds that have none."""
    tokens: dict[str, int] = {}
    for kind in kinds_of(encoder):
        if (token := getattr(base.config, KINDS[kind].token, None)) is not None:
            tokens[kind] = token
    if len(tokens) == 1:
        return {kind: tuple(tensors) for kind in tokens}
    ids = input_ids.flatten()
    ids = ids[torch.isin(ids, torch.tensor(list(tokens.values()), device=ids.device))]
    found = {kind: torch.nonzero(ids == token).flatten() for kind, token in tokens.items()}
    return {kind: tuple(tensor[places] for tensor in tensors) for kind, places in found.items() if len(places)}


class _Pooled(list[Tensor]):
    """Media tokens for models that take them as a list, one tensor an item, and for those that take one tensor."""

    def to(self, *args: Any, **options: Any) -> Tensor:
        return torch.cat(self).to(*args, **options)


class _Encoded(SimpleNamespace):
    """Encoder outputs, as the model's own getter would return them."""

    def __init__(self, embeddings: Tensor, *deepstack: Tensor) -> None:
        super().__init__(pooler_output=_Pooled([embeddings]), deepstack_features=[[feature] for feature in deepstack])
