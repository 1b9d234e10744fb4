"""Runs the demo's task for a few steps in its own layout and in a non-colocated one, in four microbatches; one line for each.

python examples/compare_digits.py [steps]
"""

import sys
from functools import partial
from pathlib import Path

import meshweave
from meshweave.layout import placements
from meshweave.model.blueprint import read_model_config
from meshweave.train.trainer import train

LAYOUTS = {
    "colocated": [],
    "non-colocated": ["modules.vision={ranks: 0-1, dp: 2}", "modules.language={ranks: 2-3, dp: 2}"],
}


def main(steps: int = 12) -> None:
    """Prints mean step time and speed without the first few steps, as the summary of a training run has them."""
    lines = []
    for name, changes in LAYOUTS.items():
        short = [f"train.steps={steps}", "train.microbatches=4", "train.warmup_steps=0", "data.eval_samples=0"]
        short.append(f"output=runs/digits/{name}")
        run = meshweave.load_config(Path(__file__).with_name("digits.yaml"), ["model=runs/digits/start", *changes, *short])
        summary = meshweave.launch(run, partial(train, config=read_model_config(run.model), overwrite=True))
        if summary is not None:
            where = ", ".join(f"{module} {placement}" for module, placement in placements(run).items())
            speed = f"{summary.seconds / summary.steps:.2f} s a step, {summary.tokens_per_second:,.0f} tokens/s"
            lines.append(f"{name + ':':<15}{speed}  ({where})")
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
