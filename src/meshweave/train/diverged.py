"""Which steps had no finite loss or gradient, and when is that the end?"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from meshweave.config import RunConfig
from meshweave.errors import DivergedError
from meshweave.step.run import Totals
from meshweave.train.output import DIVERGED


def unfinite_step(number: int, totals: Totals, samples: Sequence[int]) -> dict[str, Any]:
    """What is to be known of such a step: `what` is not finite, its loss, each module's gradient norm, its samples."""
    norms = {name: math.sqrt(norm) for name, norm in totals.squared_norms.items()}
    places = [f"the gradient of {name}" for name, norm in norms.items() if not math.isfinite(norm)]
    if not math.isfinite(totals.loss_sum):
        places.insert(0, "its loss")
    what = f"{' and '.join(places)} {'is' if len(places) == 1 else 'are'} not finite"
    return {"step": number, "what": what, "loss": totals.loss, "gradient_norms": norms, "samples": list(samples)}


def ended_by(steps: Sequence[Mapping[str, Any]], run: RunConfig, *, writes: bool) -> DivergedError:
    """The end of a run whose last steps these are; written down, with their samples, by the rank that `writes`."""
    file = run.output / DIVERGED
    if writes:
        file.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return DivergedError(
        f"steps {steps[0]['step']} to {steps[-1]['step']}: {steps[-1]['what']}, {len(steps)} steps in a row "
        f"(train.max_skipped_steps); {file} lists their samples and norms. Look at those, lower the learning rate, or clip "
        "(train.max_grad_norm), and go on from a checkpoint before them (--resume)"
    )
