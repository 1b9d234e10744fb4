"""Which function of a base model runs an encoder and its projector?

transformers' getters, and what stands in for them in models that have none.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask


def getter_of(base: Any, method: str) -> Callable[..., Any] | None:
    """A base model's method of this name, or ours in its place; None where the model has no such encoder."""
    if (ours := _OURS.get((base.config.model_type, method))) is not None:
        return lambda *args, **options: ours(base, *args, **options)
    found: Callable[..., Any] | None = getattr(base, method, None)
    return found


def _qwen2_audio_features(
    base: Any, input_features: Tensor, feature_attention_mask: Tensor, return_dict: bool = True
) -> SimpleNamespace:
    """Media tokens of spectrograms `[sounds, mels, frames]`, of which a mask `[sounds, frames]` says how long they are."""
    tower = base.audio_tower
    lengths, counts = tower._get_feat_extract_output_lengths(feature_attention_mask.sum(-1))
    positions = torch.arange(feature_attention_mask.shape[1] // 2, device=lengths.device)
    heard = (positions < lengths.unsqueeze(1)).long()
    mask = create_bidirectional_mask(
        config=tower.config, inputs_embeds=input_features.new_empty(*heard.shape, 1), attention_mask=heard
    )
    found = base.multi_modal_projector(tower(input_features, attention_mask=mask).last_hidden_state)
    return SimpleNamespace(pooler_output=[sound[:count] for sound, count in zip(found, counts.tolist(), strict=True)])


_OURS: dict[tuple[str, str], Callable[..., Any]] = {("qwen2_audio", "get_audio_features"): _qwen2_audio_features}
"""(`model_type`, method) to what the model does inline, in its forward."""
