"""What does a wrong run file get told? One line for each wrong key."""

import types
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from meshweave.config.fields import MODULES
from meshweave.config.run import RunConfig

_NEAR = 0.75
"""How alike two words are for one to be meant by the other: a letter or two of five."""

ELSEWHERE = {
    "epochs": "there is no such key; give `steps`: samples of the data × epochs / batch_size",
    "num_epochs": "there is no such key; give `steps`: samples of the data × epochs / batch_size",
    "num_train_epochs": "there is no such key; give `steps`: samples of the data × epochs / batch_size",
    "max_steps": "it is called `steps` here",
    "learning_rate": "it is called `lr` here",
    "min_lr": "give `min_lr_ratio`, a share of the peak",
    "warmup_ratio": "give `warmup_steps`",
    "adam_epsilon": "it is called `eps` here",
    "max_norm": "it is called `max_grad_norm` here",
    "global_batch_size": "it is called `batch_size` here: samples of one step, over all lanes and microbatches",
    "per_device_train_batch_size": "give `batch_size`, samples of one step over all lanes, and `microbatches`",
    "micro_batch_size": "give `batch_size`, samples of one step over all lanes, and `microbatches`",
    "gradient_accumulation_steps": "it is called `microbatches` here",
    "logging_steps": "it is called `log_every` here",
    "packing": "it is called `pack` here",
    "bf16": "set `dtype: bfloat16` at the top",
    "fp16": "set `dtype` at the top: bfloat16, float32 or float64",
    "precision": "it is called `dtype` here",
    "output_dir": "it is called `output` here",
    "model_name_or_path": "it is called `model` here",
    "tensor_parallel_size": "it is called `tp` here",
    "tensor_model_parallel_size": "it is called `tp` here",
    "pipeline_parallel_size": "it is called `pp` here",
    "pipeline_model_parallel_size": "it is called `pp` here",
    "context_parallel_size": "it is called `cp` here",
    "expert_parallel_size": "it is called `ep` here",
    "data_parallel_size": "it is called `dp` here",
    "freeze": "it is called `frozen` here",
    "max_seq_len": "give `data.max_length`",
    "max_seq_length": "give `data.max_length`",
    "cutoff_len": "give `data.max_length` with `data.too_long: cut`",
    "image_folder": "it is called `images` here",
    "data_path": "give `data.path`",
    "dataset": "give `data.path`",
    "train_file": "give `data.path`",
}
"""Keys of other trainers → what is called so, or done instead, here."""
_NOT_YET = (
    "save_every",
    "save_steps",
    "save_interval",
    "checkpoint",
    "resume",
    "resume_from_checkpoint",
    "eval_every",
    "eval_steps",
)


def describe(detail: dict[str, Any]) -> str:
    """One line for one wrong key: where, what, which value, how to fix."""
    location = tuple(part for part in detail["loc"] if not str(part).startswith(("function-", "tuple[")))
    where = ".".join(str(part) for part in location) or "run file"
    match detail["type"]:
        case "extra_forbidden":
            return f"{where}: {_unknown(str(location[-1]), known_keys(location[:-1]))}"
        case "model_type" | "dict_type":
            return f"{where}: expected keys with values, got {detail['input']!r}"
        case "missing":
            return f"{where}: this key is required"
        case "value_error":
            return f"{where}: {detail['ctx']['error']}"
        case _:
            return f"{where}: {detail['msg']} (got {detail['input']!r})"


def unknown_module(name: str) -> str | None:
    """What to say of a module of this name, where models have none that is called so; None where they may."""
    if name in MODULES:
        return None
    near = get_close_matches(name, MODULES, n=1, cutoff=_NEAR)
    return f"unknown module; did you mean {near[0]}?" if near else f"unknown module; a model has some of {', '.join(MODULES)}"


def known_keys(location: Sequence[Any]) -> list[str]:
    """The keys of the section at a place of the run file."""
    model: type[BaseModel] = RunConfig
    for part in location:
        field = model.model_fields.get(str(part))
        inner = _section(field.annotation) if field is not None else None
        model = inner or model  # a name in `modules` has the keys of a module
    return sorted(model.model_fields)


def _unknown(key: str, known: Sequence[str]) -> str:
    if key in ELSEWHERE:
        return f"unknown key; {ELSEWHERE[key]}"
    if key in _NOT_YET:
        return f"unknown key; there is no such option (keys: {', '.join(known)})"
    near = get_close_matches(key, known, n=1, cutoff=_NEAR)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; there is no such option (keys: {', '.join(known)})"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: itself, an optional one, or one by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (dict, Union, types.UnionType):
        return next((found for inner in get_args(annotation) if (found := _section(inner)) is not None), None)
    return None
