"""What could a run file for a model, some GPUs and a data file look like? A place to start from, not the best layout."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE
from meshweave.errors import ConfigError
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.modules import ENCODERS, graph_of, has_encoder

_BYTES = 16
"""Of a parameter in training: itself, its gradient and two moments, in float32."""
_SHARE = 0.6
"""Of a GPU's memory for these; the rest is for activations."""
_WHOLE = 12e9
"""Parameters of the language model up to which a rank works without tensor parallelism."""
_MICROBATCHES = 4
_RECORDS = 10_000


@dataclass(frozen=True)
class Suggestion:
    """What a run file is written from."""

    model: str
    gpus: int
    parameters: int
    gibibytes: float
    """That parameters, gradients and optimizer state take on each GPU."""
    encoders: tuple[str, ...]
    tp: int
    dp: int
    ep: int
    data: Path | None
    images: Path | None
    records: int | None

    @property
    def batch_size(self) -> int:
        """A sample a lane and microbatch."""
        return self.dp * _MICROBATCHES

    @property
    def steps(self) -> int:
        """Of one epoch, as far as that is known."""
        return max(1, (self.records or _RECORDS) // self.batch_size)


def suggest(
    model: str, config: PreTrainedConfig, gpus: int, memory: float, data: Path | None = None, records: int | None = None
) -> Suggestion:
    """A layout that fits.

    Args:
        memory: of each GPU, in GiB.

    Raises:
        ConfigError: parameters, gradients and optimizer state do not fit so many GPUs.
    """
    graph = graph_of(blueprint_of(config, STORED["bfloat16"]))
    encoders = tuple(name for name in ENCODERS if has_encoder(config, name))
    count = sum(parameter.numel() for parameter in graph.model.parameters())
    gibibytes = count * _BYTES / gpus / 2**30
    if gibibytes > _SHARE * memory:
        fewest = -(-count * _BYTES // int(_SHARE * memory * 2**30))
        raise ConfigError(
            f"{model}: {count / 1e9:.1f} B parameters, their gradients and optimizer state take {gibibytes:.0f} GiB on each of "
            f"{gpus} GPUs, more than {_SHARE:.0%} of {memory:g} GiB; give --gpus {fewest} or more, or freeze a module"
        )
    text = config.get_text_config()
    language = sum(parameter.numel() for parameter in graph.parameters(LANGUAGE).values())
    active = language / max(1, _experts(text) / 8)
    tp = next((size for size in (1, 2, 4, 8) if active / size <= _WHOLE), 8)
    while tp > 1 and (gpus % tp or text.num_attention_heads % tp or text.num_key_value_heads % tp):
        tp //= 2
    ep = 1
    while _experts(text) and ep < 8 and gpus % (2 * ep) == 0 and _experts(text) % (2 * ep) == 0:
        ep *= 2
    images = None if data is None else next((folder for folder in (data.parent / "images", data.parent) if folder.is_dir()), None)
    return Suggestion(model, gpus, count, gibibytes, encoders, tp, gpus // tp, ep, data, images, records)


def _experts(text: PreTrainedConfig) -> int:
    return int(getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0)


def run_file_text(its: Suggestion, name: str) -> str:
    """The run file, with comments.

    Args:
        name: of the file, for its commands.
    """
    ranks = f"0-{its.gpus - 1}" if its.gpus > 1 else "0"
    each = f"    ranks: {ranks}\n    dp: {its.gpus:<22}# every rank encodes its share, balanced by cost"
    encoders = "\n".join(f"  {encoder}:\n{each}" for encoder in its.encoders)
    experts = f"\n    ep: {its.ep:<22}# whole experts a rank" if its.ep > 1 else ""
    if its.data is None:
        data = "  path: data.jsonl            # JSON, JSONL, parquet or a folder of datasets; docs/data.md says what is read"
    else:
        data = f"  path: {its.data}\n  images: {its.images}"
    epoch = "one epoch" if its.records is not None else "the number of records is not known yet"
    nodes = f"--nnodes {-(-its.gpus // 8)} " if its.gpus > 8 else ""
    size = f"{its.parameters / 1e9:.2f} B parameters, their gradients and optimizer state take {its.gibibytes:.1f} GiB a GPU"
    return f"""# {its.model} on {its.gpus} GPU{"" if its.gpus == 1 else "s"}: a place to start from, not the best layout.
# Every rank encodes; the language model is tensor-parallel only where it is large.
# {size}, activations not counted.
#   meshweave inspect {name}                 who holds what; starts nothing
#   meshweave data check {name}              what is in the data, and what a run would skip
#   meshweave balance {name}                 how even the data can be worked
#   meshweave verify {name} --shrink         the same layouts on a tiny model, against the plain one
#   torchrun {nodes}--nproc-per-node {min(8, its.gpus)} -m meshweave train {name}
model: {its.model}

modules:
{encoders}
  language:
    ranks: {ranks}
    tp: {its.tp}
    dp: {its.dp}{experts}

data:
{data}

train:
  steps: {its.steps:<22}# {epoch}
  batch_size: {its.batch_size:<17}# samples of a step, over all lanes and microbatches
  microbatches: {_MICROBATCHES}
  lr: 2.0e-5
  warmup_steps: {min(its.steps, max(1, its.steps // 33))}

dtype: bfloat16                 # of computation; parameters, optimizer state and gradient sums stay float32
output: runs/{Path(name).stem}
"""
