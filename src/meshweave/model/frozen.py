"""Which parameters are not trained?"""

from collections.abc import Iterable

from meshweave.config import ModuleConfig


def frozen_names(module: ModuleConfig, names: Iterable[str]) -> frozenset[str]:
    """Those of a module's full parameter names that its `frozen` covers."""
    if isinstance(module.frozen, bool):
        return frozenset(names if module.frozen else ())
    return frozenset(name for name in names if any(text in name for text in module.frozen))


def lost_texts(module: ModuleConfig, names: Iterable[str]) -> list[str]:
    """Texts of `frozen` that no parameter's name contains."""
    texts = () if isinstance(module.frozen, bool) else module.frozen
    every = list(names)
    return [text for text in texts if not any(text in name for name in every)]
