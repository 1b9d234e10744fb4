"""`meshweave export`: how does a checkpoint become a model folder?"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meshweave.cli.common import run_command


class Dtype(StrEnum):
    """Of the tensors that leave."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


def export_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint, or a run folder for its newest.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of all tensors; left out, as in the folder the run started from.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="The folder the run started from, if it is no longer where the run file says.")
    ] = None,
) -> None:
    """Write a checkpoint as an ordinary Hugging Face folder: keys, forms, dtypes and other files are those of the folder that the
    run started from. One parameter at a time, in this process; no GPU is used."""

    def work() -> None:
        import torch

        from meshweave.checkpoint.folder import plan_folder, write_folder
        from meshweave.checkpoint.manifest import check_sizes, newest_whole, read_manifest
        from meshweave.checkpoint.storage import whole_parameters
        from meshweave.model.blueprint import STORED, read_model_config

        found = newest_whole(checkpoint)[0] or checkpoint
        manifest = read_manifest(found)
        check_sizes(found, manifest)
        run = manifest.run
        source = model or Path(run["model"])
        plan = plan_folder(
            source,
            read_model_config(source),
            seed=run["seed"] if run["weights"] == "seeded" else None,
            seeded_dtype=STORED[run["dtype"]],
            dtype=getattr(torch, dtype) if dtype else None,
        )
        write_folder(plan, whole_parameters(found), out)
        Console().print(f"{found} is {out}, {plan.size / 1e9:.3g} GB", highlight=False)

    run_command(work)
