"""What may a run file say at its top, and what must its sections agree on?"""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from meshweave.config.data import DataConfig
from meshweave.config.fields import LANGUAGE, AnyRanks, Strict
from meshweave.config.module import ModuleConfig
from meshweave.config.schedule import ScheduleConfig
from meshweave.config.train import TrainConfig


class RunConfig(Strict):
    """One run: the model, a layout and ranks per module, data, training."""

    model: Path
    """Local Hugging Face model folder, or the id of a model on the Hub (`Qwen/Qwen3-VL-8B-Instruct`)."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub; its default branch if left out."""
    modules: dict[str, ModuleConfig] = Field(min_length=1)
    """Layout per module: `language`, and one entry per encoder (`vision`)."""
    data: DataConfig | None = None
    """Needed to train; `inspect` and `verify` go without."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Order of work; needed for pipelines and for modules that share ranks or do not."""
    train: TrainConfig
    weights: Literal["pretrained", "seeded"] = "pretrained"
    """Read the folder's safetensors, or initialise from `seed` (identical under every layout)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of computation; bfloat16 keeps parameters, optimizer state and gradient sums in float32."""
    seed: NonNegativeInt = 0
    output: Path = Path("runs/latest")
    """Run folder: metrics, plots, final model."""
    node_size: PositiveInt | None = None
    """Ranks per node: media tokens then cross between nodes once per node."""
    idle_ranks: AnyRanks = ()
    """Ranks that no module uses, on purpose."""
    timeout_seconds: PositiveFloat = 600.0
    """A rank that waits longer for another, in a collective or for a message, ends the run."""
    preemption_seconds: PositiveFloat = 60.0
    """A run that is asked to stop (SIGTERM, SIGUSR1, SIGHUP, Ctrl-C) has so long to end its step and to save; then its ranks are
    killed. Under torchrun or Slurm theirs is what counts."""

    @model_validator(mode="after")
    def _ranks_cover_the_world(self) -> "RunConfig":
        if LANGUAGE not in self.modules:
            raise ValueError(f"modules: there is no {LANGUAGE!r} among {sorted(self.modules)}; every run has a language model")
        used = {rank for module in self.modules.values() for rank in module.ranks}
        both = sorted(used & set(self.idle_ranks))
        if both:
            raise ValueError(f"idle_ranks lists ranks {both}, which modules use; take them out of one of the two")
        named = used | set(self.idle_ranks)
        missing = sorted(set(range(max(named) + 1)) - named)
        if missing:
            raise ValueError(
                f"ranks {missing} belong to no module; give them to one, or list them under `idle_ranks` if they shall do nothing"
            )
        return self

    @model_validator(mode="after")
    def _budget_is_of_packed_sequences(self) -> "RunConfig":
        if self.train.max_tokens is not None and not self.packed:
            raise ValueError(
                f"train.max_tokens={self.train.max_tokens}: only packed sequences have a token budget; set train.pack: true, or "
                "take it out"
            )
        return self

    @property
    def world_size(self) -> int:
        """Ranks of the run, idle ones included."""
        return 1 + max([rank for module in self.modules.values() for rank in module.ranks] + list(self.idle_ranks))

    @property
    def packed(self) -> bool:
        """Whether a lane's samples lie one behind the other in one sequence: asked for, or because sequences are cut."""
        language = self.modules[LANGUAGE]
        return self.train.pack or language.cp > 1 or (language.tp > 1 and language.sequence_parallel)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the modules other than the language model, in the run file's order."""
        return tuple(name for name in self.modules if name != LANGUAGE)
