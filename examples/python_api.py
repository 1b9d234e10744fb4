"""The Python API: check a layout against the single process, from a run file or from plain values.

python examples/python_api.py examples/non_colocated.yaml
"""

import sys
from functools import partial
from pathlib import Path

import meshweave
from meshweave.model.blueprint import read_model_config
from meshweave.model.shrink import shrink


def main(run_file: str) -> None:
    """Verifies a tiny model of the run's architecture in the run's layouts, for two steps."""
    run = meshweave.load_config(Path(run_file), overrides=["weights=seeded", "dtype=float64", "data=null"])
    config = shrink(read_model_config(run.model))
    report = meshweave.launch(run, partial(meshweave.verify, config=config, steps=2))
    if report is not None:
        print(f"passed: {report.passed}, worst gradient error {report.gradient.error:.1e} ({report.gradient.name})")


if __name__ == "__main__":
    main(*sys.argv[1:])
