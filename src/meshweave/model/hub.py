"""Where are a model's files? In a local folder, or on the Hugging Face Hub, of which only the files that are needed come here."""

import re
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from meshweave.config import RunConfig
from meshweave.errors import CheckpointError, cause

Need = Literal["config", "processor", "weights"]
"""What a command reads of a model; each needs the ones before it, too."""

_CONFIG = ("config.json", "generation_config.json")
_PROCESSOR = (
    "*processor_config.json",
    "*preprocessor_config.json",
    "chat_template*",
    "*token*",
    "vocab*",
    "merges.txt",
    "*.model",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_BESIDE = ("LICENSE*", "NOTICE*")
"""What a trained model must take along."""
FILES: dict[Need, tuple[str, ...]] = {
    "config": _CONFIG,
    "processor": (*_CONFIG, *_PROCESSOR),
    "weights": (*_CONFIG, *_PROCESSOR, *_WEIGHTS, *_BESIDE),
}
"""Patterns of the names of files at the top of a repository."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def with_local_model(run: RunConfig, need: Need) -> RunConfig:
    """The run with `model` as a local folder: its own, or that of a snapshot of the Hub, from the cache where it is there.

    Raises:
        CheckpointError: `model` is no folder, and the Hub and its cache have no such repository or revision, or it is gated.
    """
    name = str(run.model)
    if run.model.is_dir() or not _ID.fullmatch(name):
        return run
    try:
        # Folders inside hold other forms of the same weights.
        folder = snapshot_download(name, revision=run.revision, allow_patterns=list(FILES[need]), ignore_patterns=["*/*"])
    except GatedRepoError as error:
        raise CheckpointError(f"model: {name} is gated; ask for access on its page and log in (`hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"model: {name} has no revision {run.revision!r} on the Hub; check `revision`") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"model: there is no folder {name!r} in {Path.cwd()}, and no model {name} on the Hub") from error
    except Exception as error:  # no net, no cache, a full disk: whatever the library raises is about this model
        raise CheckpointError(
            f"model: there is no folder {name!r} in {Path.cwd()}, and {name} can be had neither from the Hub nor from its cache "
            f"({cause(error)})"
        ) from error
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"model: the cached snapshot {folder} of {name} has no config.json; download it where there is a net"
        )
    return run.model_copy(update={"model": Path(folder)})
