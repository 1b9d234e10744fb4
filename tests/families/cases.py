"""Which layouts is every family proven in? The table behind docs/families.md: a form is a test case of each family.

A form names the columns of the docs table that it proves; a family and form that cannot be have the message that says so.
"""

from dataclasses import dataclass, field
from typing import Any

from support.families import FAMILIES
from support.runs import module

COLUMNS = ("colocated", "apart", "encoder tp", "encoder cp", "encoder pp", "tp", "pp", "cp", "ep")


@dataclass(frozen=True)
class Form:
    """One layout of every module."""

    columns: tuple[str, ...]
    """What it proves."""
    encoders: dict[str, Any]
    language: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    """Further keys of the run file."""


FORMS = {
    "tp": Form(("colocated", "tp"), module("0-1", dp=2), module("0-1", tp=2)),
    "pp": Form(("colocated", "pp"), module("0-1", dp=2), module("0-1", pp=2)),
    "encoder tp": Form(("colocated", "encoder tp"), module("0-1", tp=2), module("0-1", dp=2)),
    "encoder tp, cp": Form(("colocated", "encoder tp", "cp"), module("0-1", tp=2), module("0-1", cp=2)),
    "encoder cp": Form(("apart", "encoder cp"), module("0-1", cp=2), module("2")),
    "encoder pp, pp": Form(("apart", "encoder pp", "pp"), module("0-1", pp=2), module("2-3", pp=2)),
    "encoder pp": Form(("apart", "encoder pp"), module("0-1", pp=2), module("2")),
    "ep": Form(("colocated", "ep"), module("0-1", dp=2), module("0-1", dp=2, ep=2)),
    "apart": Form(("apart",), module("0"), module("1")),
}

OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen3_5", "tp"): {"sequence_parallel": False},
}
"""Family and form to what its language model is told besides."""

NO_CUT = "it is not known where this module may be cut into pipeline stages"
REFUSED = {
    ("qwen3_5", "encoder tp, cp"): "qwen3_5_text has linear_attention layers, which carry a state along the sequence",
    ("gemma4", "encoder pp"): NO_CUT,
    ("gemma4_e", "encoder pp"): NO_CUT,
    ("gemma4_e", "pp"): "every layer of gemma4_text takes an embedding of its own",
}
"""Family and form to the message with which it is refused."""


EXPERTS = frozenset({"qwen3_vl_moe", "qwen3_omni_moe"})
"""Families that have experts."""


PATCHES = frozenset({"qwen2_5_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe"})
"""Families whose encoder takes the patches of all items as one sequence."""


def cases() -> list[tuple[str, str]]:
    """Every family and form that is run."""
    return [(family, form) for family in FAMILIES for form in FORMS if (family, form) not in REFUSED and _is_run(family, form)]


def _is_run(family: str, form: str) -> bool:
    if form in ("apart", "pp"):  # follow from an encoder in a pipeline of its own, where there is one
        return (family, "encoder pp") in REFUSED
    if form == "encoder pp, pp":
        return (family, "encoder pp") not in REFUSED
    if form == "encoder pp":
        return False
    if form == "encoder tp":
        return (family, "encoder tp, cp") in REFUSED
    if form == "encoder cp":
        return family in PATCHES
    return form != "ep" or family in EXPERTS
