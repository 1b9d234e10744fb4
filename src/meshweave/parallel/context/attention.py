"""How does a stock model attend over a lane's packed, cut sequence? By the attention implementation registered here.

It is known to transformers as `IMPLEMENTATION` and finds its `SequencePlan` among the forward's keyword arguments
(`model.base_model(..., sequence=plan)`), which transformers hands down to every attention layer. There is no entry in
`AttentionMaskInterface`: for an implementation without one, transformers builds no masks, and does not look into position ids
for packed sequences.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from meshweave.errors import LayoutError
from meshweave.parallel.context.plan import SequencePlan
from meshweave.parallel.context.ring import ring_attention
from meshweave.parallel.context.ulysses import to_heads, to_rows

IMPLEMENTATION = "meshweave"

_UNSUPPORTED = {
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "position_bias": "a learned position bias",
}


def sequence_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sequence: SequencePlan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of this rank's rows, as transformers calls it.

    Args:
        query, key, value: `[1, heads, rows, dim]`, `[1, kv heads, rows, dim]` twice.
        attention_mask: None; which keys a query sees follows from `sequence`, and of its masks from `sliding_window`.

    Returns `[1, rows, heads, dim]` and no weights.

    Raises LayoutError: no plan, or not for these tensors; an attention mask; a kind of attention that is not built.
    """
    layer = type(module).__name__
    if sequence is None:
        raise LayoutError(f"{layer} got no plan of its sequence: call the model with sequence=SequencePlan(...)")
    if attention_mask is not None:
        raise LayoutError(f"{layer} got an attention mask: leave it out, documents and padding are in the plan of the sequence")
    if query.shape[0] != 1 or query.shape[2] != sequence.rows:
        raise LayoutError(
            f"{layer} got queries of {query.shape[0]} x {query.shape[2]} positions, but its lane's sequence is one row, "
            f"of which a rank holds {sequence.rows} positions"
        )
    if dropout:
        raise LayoutError(
            f"{layer} asks for dropout {dropout} of attention weights, which is not built: set attention_dropout to 0"
        )
    for name, what in _UNSUPPORTED.items():
        if others.get(name) is not None:
            raise LayoutError(f"{layer} asks for {what} ({name}), which is not built with packed or cut sequences")
    u = sequence.ulysses_size(key.shape[1])
    ring = sequence.ring(sequence.mask(sliding_window), u, query.device, query.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if u == 1:
        return ring_attention(query, key, value, ring, scale).transpose(1, 2), None
    order, back, group = sequence.ulysses(u, query.device)
    counts = [sequence.rows] * u
    q, k, v = (to_heads(x[0], counts, group).index_select(1, order)[None] for x in (query, key, value))
    attended = ring_attention(q, k, v, ring, scale)[0].index_select(1, back)
    return to_rows(attended, counts, group).transpose(0, 1)[None], None


AttentionInterface.register(IMPLEMENTATION, sequence_attention)
