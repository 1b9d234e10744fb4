"""What does a whole model look like? Its config, and its shapes and names without memory."""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from meshweave.errors import CheckpointError

STORED = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Run dtype to the dtype of parameters, optimizer state and gradient sums."""

TRAVELS_AS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""Run dtype to the dtype of media tokens on the boundary."""


def experts_implementation(dtype: torch.dtype) -> str | None:
    """transformers' way to run experts in a dtype; None is its fastest, which knows no float64."""
    return "eager" if dtype == torch.float64 else None


def read_model_config(folder: Path) -> PreTrainedConfig:
    """Config of a local model folder.

    Raises:
        CheckpointError: the folder or its config.json is missing or unreadable.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model: {str(folder)!r} holds no config.json (looked in {Path.cwd()}); give a local Hugging Face folder"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"model: {folder / 'config.json'} is not a config this transformers can read: {error}") from error


def blueprint_of(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on the meta device: shapes and names, no memory."""
    # A copy: transformers writes these choices into the config that a model is made from.
    config = copy.deepcopy(config)
    experts = experts_implementation(dtype)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
        )
    return model.train()
