"""Is it on the disk for good, and is there room for more?"""

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, outlast a machine that goes down."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(file: Path, data: bytes) -> None:
    """Writes a file that is either there whole, also after the machine went down, or not at all."""
    draft = file.with_name(f".{file.name}")
    draft.write_bytes(data)
    sync(draft)
    draft.replace(file)
    sync(file.parent)


def require_space(folder: Path, needed: int) -> None:
    """Raises OSError if the disk that `folder` is on has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free on the disk of {str(folder)!r}")
