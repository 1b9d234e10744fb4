"""How does a model split over `tp`? As data, next to the model it belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass, field

PARTIAL_GRADIENT = "replicated_with_grad_allreduce"
"""Style of a replicated parameter that sees only this rank's heads (Qwen3's q_norm): its gradient is a partial sum over `tp`."""

PACKED_QKV = "packed_qkv"
"""Style (ours) of a fused query-key-value projection: parameters whole over `tp`, computed by heads."""


@dataclass(frozen=True)
class TensorPlan:
    """How one transformers model splits over `tp`."""

    rules: Mapping[str, str] = field(default_factory=dict)
    """Module or parameter name, `*` for a layer number, to the name of a transformers style."""
    heads: Mapping[str, str] = field(default_factory=dict)
    """Module name to the attribute that counts its heads, where the forward reads it: it is divided by `tp`."""
