"""Train one multimodal model whose modules each have their own parallel layout and their own ranks.

The public names; everything else may change. They are imported on first use, so that `meshweave --help` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshweave.batch.plan import plan_step as plan_step
    from meshweave.boundary import exchange as exchange
    from meshweave.boundary import lane_ownership as lane_ownership
    from meshweave.boundary import plan_transfer as plan_transfer
    from meshweave.config import RunConfig as RunConfig
    from meshweave.config import load_config as load_config
    from meshweave.layout import Layout as Layout
    from meshweave.layout import Placement as Placement
    from meshweave.schedule.plan import plan_schedule as plan_schedule
    from meshweave.schedule.simulate import simulate as simulate
    from meshweave.verification.compare import verify as verify
    from meshweave.world import launch as launch

_HOMES = {
    "Layout": "meshweave.layout",
    "Placement": "meshweave.layout",
    "RunConfig": "meshweave.config",
    "exchange": "meshweave.boundary",
    "lane_ownership": "meshweave.boundary",
    "launch": "meshweave.world",
    "load_config": "meshweave.config",
    "plan_schedule": "meshweave.schedule.plan",
    "plan_step": "meshweave.batch.plan",
    "plan_transfer": "meshweave.boundary",
    "simulate": "meshweave.schedule.simulate",
    "verify": "meshweave.verification.compare",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'meshweave' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
