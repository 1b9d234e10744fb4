"""What does a whole model look like? Its config, and its shapes and names without memory."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from meshweave.errors import CheckpointError, ConfigError, cause

STORED = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Run dtype to the dtype of parameters, optimizer state and gradient sums."""

TRAVELS_AS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""Run dtype to the dtype of media tokens on the boundary."""


def implementations(dtype: torch.dtype) -> dict[str, str]:
    """Which of transformers' implementations of attention and experts run, here and in the oracle."""
    # The grouped product of experts knows no float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    return {"attn_implementation": "sdpa"} | experts


def read_model_config(folder: Path) -> PreTrainedConfig:
    """Config of a local model folder.

    Raises:
        CheckpointError: the folder or its config.json is missing or unreadable.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model: {str(folder)!r} holds no config.json (looked in {Path.cwd()}); give a Hugging Face folder, or "
            "the id of a model on the Hub"
        )
    try:
        # Else transformers asks on the terminal whether code of the folder may run.
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a library raises of a config is about the config
        raise CheckpointError(
            f"model: {folder / 'config.json'} is not a config this transformers can read ({cause(error)}); "
            "copy it from where the model was published"
        ) from error


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' class that makes the trainable model of a config: of images and text, else of any media and text.

    Raises:
        ConfigError: there is none.
    """
    for found in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in found._model_mapping:  # type: ignore[attr-defined]
            return found
    raise ConfigError(f"model: transformers knows no model of media and text of type {config.model_type!r}")


def blueprint_of(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on the meta device: shapes and names, no memory.

    Raises:
        ConfigError: transformers has no class for the config, or one that cannot be built of it.
    """
    # A copy: transformers writes these choices into the config that a model is made from.
    config = copy.deepcopy(config)
    stock = auto_class(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = stock.from_config(config, dtype=dtype, **implementations(dtype))
    except Exception as error:  # whatever a stock class raises of its config is about the config
        raise ConfigError(
            f"model: config.json: transformers cannot build its {config.model_type} model ({cause(error)}); "
            "compare it with the published one"
        ) from error
    return model.train()
