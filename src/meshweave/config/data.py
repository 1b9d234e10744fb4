"""`data:` what may a run file say of what is read?"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from meshweave.config.fields import Strict


def _renamed(value: Any) -> Any:
    """`llava_json` is what `files` was called when it read nothing else."""
    return "files" if value == "llava_json" else value


class DataConfig(Strict):
    """What is read."""

    source: Annotated[Literal["files", "digits", "synthetic"], BeforeValidator(_renamed)] = "files"
    """`files`: what you bring; `digits`: the demo; `synthetic`: random samples."""
    path: Path | None = None
    """`files`: a JSON list, JSONL, parquet, or a folder that Hugging Face `datasets` saved."""
    images: Path | None = None
    """`files`: the folder that names of media are relative to; the file's own folder if left out."""
    form: Literal["auto", "conversations", "messages", "query_response"] = "auto"
    """`files`: how records are written (docs/data.md); `auto` tells each by its keys."""
    ignore_keys: tuple[str, ...] = ()
    """`files`: keys of records that may stand there although nothing reads them."""
    eval_path: Path | None = None
    """`files`: held-out samples, evaluated at the end."""
    samples: PositiveInt | None = None
    """`digits` and `synthetic`: number of training samples."""
    eval_samples: NonNegativeInt = 0
    """`digits` and `synthetic`: number of held-out samples, evaluated at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """A record or media file that cannot be read: skip its sample on all ranks alike (named and counted), or stop."""
    max_skipped: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of the samples of a window that may be unreadable before the run stops."""
    train_on: Literal["all", "last", "flagged"] = "all"
    """Which answers are targets: every one, the last of a conversation, or those that the record's own flags name."""
    reasoning: Literal["keep", "drop"] = "keep"
    """What stands between `<think>` and `</think>` in an answer: a target as the template writes it, an empty block included; or
    taken out of the record, and an empty block that the template writes is no target."""
    max_length: PositiveInt | None = None
    """Most tokens of a sample, media tokens included."""
    too_long: Literal["drop", "cut"] = "drop"
    """A sample that is longer than `max_length`: left out, or its text cut at the end, never inside media."""
    min_pixels: PositiveInt | None = None
    """A picture with fewer pixels is enlarged to so many, before the model's processor sees it."""
    max_pixels: PositiveInt | None = None
    """A picture with more pixels is reduced to so many, before the model's processor sees it."""
    max_sample_pixels: PositiveInt | None = None
    """The pictures of a sample that have more pixels together are reduced alike."""
    max_images: PositiveInt | None = None
    """A sample with more pictures is left out."""

    @model_validator(mode="after")
    def _keys_fit_the_source(self) -> "DataConfig":
        of_files, of_generated = {"path", "images", "eval_path", "form", "ignore_keys"}, {"samples", "eval_samples"}
        unused = sorted((of_generated if self.source == "files" else of_files) & self.model_fields_set)
        if unused:
            raise ValueError(f"{', '.join(unused)}: source {self.source} does not read this; take it out or change the source")
        if self.source == "files" and self.path is None:
            raise ValueError("source files needs `path`, the file or folder to read")
        return self
