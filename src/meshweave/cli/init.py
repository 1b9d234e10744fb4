"""`meshweave init`: what run file could one start from?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meshweave.cli.common import run_command
from meshweave.config import parse_config
from meshweave.errors import ConfigError, DataError


def init_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, or id on the Hub.", show_default=False)],
    run_file: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run file to write.")] = Path("run.yaml"),
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs; left out, those of this machine.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="GiB of each; left out, of those here, else 80.")] = None,
    data: Annotated[Path | None, typer.Option(help="File or folder of records.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented run file for a model, a number of GPUs and a data file: a layout that fits, to start from."""

    def work() -> None:
        import torch

        from meshweave.config import DataConfig
        from meshweave.data.build import open_source
        from meshweave.model.blueprint import read_model_config
        from meshweave.model.hub import with_local_model
        from meshweave.preview.suggest import run_file_text, suggest

        if run_file.exists() and not force:
            raise ConfigError(f"{run_file} is there already; name another file, or write over it (--force)")
        here = torch.cuda.device_count()
        if gpus is None and not here:
            raise ConfigError("there is no GPU here to count; give --gpus")
        memory = gpu_memory or (torch.cuda.get_device_properties(0).total_memory / 2**30 if here else 80.0)
        named = parse_config({"model": model, "modules": {"language": {"ranks": "0"}}, "train": {"steps": 1, "batch_size": 1}})
        config = read_model_config(with_local_model(named, "config").model)
        records = None
        if data is not None:
            try:
                records = len(open_source(DataConfig(path=data), data))
            except DataError as error:
                Console(stderr=True).print(f"records are not counted: {error}", style="yellow", markup=False)
        found = suggest(model, config, gpus or here, memory, data, records)
        run_file.write_text(run_file_text(found, str(run_file)))
        Console().print(
            f"wrote {run_file}: tp {found.tp}, dp {found.dp}, {found.steps:,} steps of {found.batch_size} samples",
            highlight=False,
        )

    run_command(work)
