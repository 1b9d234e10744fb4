"""`schedule:` what may a run file say of the order of work?"""

from typing import Literal

from pydantic import PositiveInt

from meshweave.config.fields import Strict


class ScheduleConfig(Strict):
    """In which order ranks work a step."""

    encoders: Literal["auto", "three_phase", "graph_1f1b", "nested"] = "auto"
    """How encoder work joins the language model's pipeline. `three_phase`: before and after it, macro-batch by macro-batch;
    `graph_1f1b`: as further stages of one pipeline; `nested`: inside its bubbles. `auto`: `three_phase` where every encoder rank
    is a language rank and every language rank an encoder rank, else `graph_1f1b`."""
    language: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order inside the language model's pipeline."""
    virtual_stages: PositiveInt = 2
    """`interleaved`: pieces of the language model that each of its ranks holds."""
    macro_batch: PositiveInt | None = None
    """`three_phase`, `graph_1f1b`: language-model microbatches that one encoder pass serves; left out, it is all of them for
    `three_phase` before a pipeline, else one."""
