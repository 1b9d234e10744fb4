"""`meshweave checkpoint`: which checkpoints are there, and are they whole?"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from meshweave.cli.common import run_command

if TYPE_CHECKING:
    from meshweave.report.checkpoints import CheckpointRow

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or one checkpoint's.", show_default=False)]

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at the checkpoints of a run.")


@checkpoint_app.command("list")
def list_command(folder: Folder) -> None:
    """List a run's checkpoints: step, size, age, layout, and whether each is whole."""
    from meshweave.report.checkpoints import render_checkpoints

    run_command(lambda: Console().print(render_checkpoints([_row(checkpoint) for checkpoint in _folders(folder)])))


@checkpoint_app.command("check")
def check_command(folder: Folder) -> None:
    """Read every file of the checkpoints and compare sizes and checksums; exit code 2 if one is damaged."""
    from meshweave.checkpoint.manifest import check_sizes, check_sums, read_manifest
    from meshweave.errors import CheckpointError

    def work() -> None:
        faults = []
        for checkpoint in _folders(folder):
            try:
                manifest = read_manifest(checkpoint)
                check_sizes(checkpoint, manifest)
                check_sums(checkpoint, manifest, manifest.files)
                Console().print(f"{checkpoint}: {len(manifest.files)} files are as they were written", highlight=False)
            except CheckpointError as error:
                faults.append(str(error))
        if faults:
            raise CheckpointError("\n".join(faults))

    run_command(work)


@checkpoint_app.command("show")
def show_command(folder: Folder) -> None:
    """Show what the newest whole checkpoint (or the named one) says of itself: run file, versions, progress, files."""
    from meshweave.checkpoint.manifest import newest_whole, read_manifest
    from meshweave.report.checkpoints import render_manifest

    def work() -> None:
        manifest = read_manifest(newest_whole(folder)[0] or _folders(folder)[-1])
        files = {name: file.bytes for name, file in manifest.files.items()}
        Console().print(render_manifest(manifest.model_dump(mode="json", exclude={"files"}), files))

    run_command(work)


def _row(folder: Path) -> "CheckpointRow":
    from datetime import datetime

    from meshweave.checkpoint.manifest import check_sizes, read_manifest
    from meshweave.errors import CheckpointError
    from meshweave.report.checkpoints import CheckpointRow

    row = CheckpointRow(folder.name)
    try:
        manifest = read_manifest(folder)
        saved = datetime.fromisoformat(manifest.saved)
        row = CheckpointRow(folder.name, None, manifest.step, manifest.bytes, saved, manifest.run["modules"])
        check_sizes(folder, manifest)
    except CheckpointError as error:
        return replace(row, fault=str(error).removeprefix(f"{folder}: "))
    return row


def _folders(folder: Path) -> list[Path]:
    """The checkpoint that is named, or those of the run; at least one."""
    from meshweave.checkpoint.manifest import CHECKPOINTS, MANIFEST, checkpoint_folders
    from meshweave.errors import CheckpointError

    if (folder / MANIFEST).exists() or folder.parent.name == CHECKPOINTS:
        return [folder]
    if not (found := checkpoint_folders(folder)):
        raise CheckpointError(f"{folder}: holds no checkpoints (looked for {folder / CHECKPOINTS / 'step-…'})")
    return found
