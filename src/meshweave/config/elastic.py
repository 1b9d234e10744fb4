"""Which of a run file's layouts fits the ranks that are there? A run that loses ranks goes on with fewer, and grows back."""

from collections.abc import Mapping
from typing import Any

from meshweave.config.run import RunConfig
from meshweave.errors import ConfigError

_KEPT = ("lr", "frozen")
"""Of a module: what is no matter of layout."""

_KEYS = ("modules", "schedule", "idle_ranks", "node_size")
"""Of a layout; what one leaves out is as by default."""


def alternatives(tree: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The run file as it is, and with each of its `layouts` in the place of its own; their sections are not checked.

    A module's `lr` and `frozen` are no matter of layout: they are as at the top, unless a layout says otherwise.

    Raises:
        ConfigError: `layouts` is no list of mappings with modules.
    """
    own = {key: value for key, value in tree.items() if key != "layouts"}
    layouts = [] if tree.get("layouts") is None else tree["layouts"]
    fault = None
    if not isinstance(layouts, list) or not all(
        isinstance(its, dict) and isinstance(its.get("modules"), dict) for its in layouts
    ):
        fault = "layouts: a list of sections with `modules`, one for each further number of ranks"
    elif other := [f"layouts[{number}].{key}" for number, its in enumerate(layouts) for key in its if key not in _KEYS]:
        fault = f"{other[0]}: a layout has {', '.join(_KEYS)}; the rest of a run is the same in all of them"
    if fault is not None:
        raise ConfigError(f"{where}:\n  {fault}")
    return [own, *({**_without_layout(own), **its, "modules": _modules(own, its["modules"])} for its in layouts)]


def fitting(runs: list[RunConfig], ranks: int | None) -> RunConfig:
    """The first that has as many ranks as there are, or else the first that has fewer, the others idle; the first of all where
    their number is not known.

    Raises:
        ConfigError: all need more.
    """
    if ranks is None or len(runs) == 1:
        return runs[0]
    smaller = [run for run in runs if run.world_size <= ranks]
    if not smaller:
        sizes = ", ".join(str(run.world_size) for run in runs)
        raise ConfigError(f"layouts: there are {ranks} ranks, and the run file's layouts need {sizes}; add one for {ranks}")
    run = next((run for run in smaller if run.world_size == ranks), smaller[0])
    return run.model_copy(update={"idle_ranks": (*run.idle_ranks, *range(run.world_size, ranks))})


def _without_layout(own: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if key not in _KEYS}


def _modules(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    said = own.get("modules")
    before = said if isinstance(said, dict) else {}

    def kept(name: str) -> dict[str, Any]:
        module = before.get(name)
        return {key: module[key] for key in _KEPT if key in module} if isinstance(module, dict) else {}

    return {name: {**kept(name), **its} if isinstance(its, dict) else its for name, its in theirs.items()}
