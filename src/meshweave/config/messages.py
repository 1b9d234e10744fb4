"""What does a wrong run file get told? One line for each wrong key."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from meshweave.config.data import DataConfig
from meshweave.config.module import ModuleConfig
from meshweave.config.run import RunConfig
from meshweave.config.schedule import ScheduleConfig
from meshweave.config.train import TrainConfig


def describe(detail: dict[str, Any]) -> str:
    """One line for one wrong key: where, what, which value, how to fix."""
    location = tuple(part for part in detail["loc"] if not str(part).startswith(("function-", "tuple[")))
    where = ".".join(str(part) for part in location) or "run file"
    match detail["type"]:
        case "extra_forbidden":
            known = _known_keys(location[:-1])
            near = get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            return f"{where}: unknown key; {hint}"
        case "model_type" | "dict_type":
            return f"{where}: expected keys with values, got {detail['input']!r}"
        case "missing":
            return f"{where}: this key is required"
        case "value_error":
            return f"{where}: {detail['ctx']['error']}"
        case _:
            return f"{where}: {detail['msg']} (got {detail['input']!r})"


def _known_keys(location: Sequence[Any]) -> list[str]:
    nested: dict[str, type[BaseModel]] = {
        "modules": ModuleConfig,
        "data": DataConfig,
        "schedule": ScheduleConfig,
        "train": TrainConfig,
    }
    model: type[BaseModel] = RunConfig
    for part in location:
        model = nested.get(str(part), model)
    return sorted(model.model_fields)
