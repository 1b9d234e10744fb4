"""What do the sections of a run file share? Strictness, and how ranks are written."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt

LANGUAGE = "language"
"""Name of the language model among a run's modules; every other module is an encoder."""

MODULES = (LANGUAGE, "vision", "audio")
"""Names of modules that models have (`model/modules.py` says how each runs)."""


def ranks_from_text(value: Any) -> Any:
    """`0-3`, `0,2,4-7`, `5` and `[0, 2]` all mean a tuple of ranks."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        return value
    ranks: list[int] = []
    for part in value.split(","):
        bounds = [bound.strip() for bound in part.split("-")]
        if len(bounds) > 2 or not all(bound.isdigit() for bound in bounds):
            raise ValueError(f"expected rank numbers and ranges, such as 0-3 or 0,2,4-7 (got {value!r})")
        first, last = int(bounds[0]), int(bounds[-1])
        if first > last:
            raise ValueError(f"the range {part.strip()} runs backwards; write {last}-{first}")
        ranks.extend(range(first, last + 1))
    return tuple(ranks)


AnyRanks = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(ranks_from_text)]
Ranks = Annotated[AnyRanks, Field(min_length=1)]


class Strict(BaseModel):
    """A section: an unknown key is an error, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
