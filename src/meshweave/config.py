"""RunConfig: what a run file may say, and every message a wrong one gets."""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from meshweave.errors import ConfigError

LANGUAGE = "language"
"""Name of the language model among a run's modules; every other module is an encoder."""


def _ranks_from_text(value: Any) -> Any:
    """`0-3`, `0,2,4-7`, `5` and `[0, 2]` all mean a tuple of ranks."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, str):
        return value
    ranks: list[int] = []
    for part in value.split(","):
        bounds = [bound.strip() for bound in part.split("-")]
        if len(bounds) > 2 or not all(bound.isdigit() for bound in bounds):
            raise ValueError(f"expected rank numbers and ranges, such as 0-3 or 0,2,4-7 (got {value!r})")
        first, last = int(bounds[0]), int(bounds[-1])
        if first > last:
            raise ValueError(f"the range {part.strip()} runs backwards; write {last}-{first}")
        ranks.extend(range(first, last + 1))
    return tuple(ranks)


AnyRanks = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_ranks_from_text)]
Ranks = Annotated[AnyRanks, Field(min_length=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModuleConfig(_Strict):
    """Layout, ranks and training options of one module."""

    ranks: Ranks
    """Ranks the module runs on, ascending, e.g. `0-7` or `0-3,8-11`; `tp` neighbours are adjacent in this list."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    dp: PositiveInt
    """Lanes (data parallelism); left out, it fills the ranks that the other sizes leave."""
    cp: PositiveInt = 1
    """Context parallelism."""
    tp: PositiveInt = 1
    """Tensor parallelism."""
    ep: PositiveInt = 1
    """Expert parallelism."""
    etp: PositiveInt = 1
    """Tensor parallelism inside one expert."""
    replicas: PositiveInt = 1
    """Ranks that repeat the same work."""
    sequence_parallel: bool = True
    """`language` with `tp` above 1: shard activations between blocks over `tp` along the sequence."""
    context_parallel: Literal["ring", "ulysses"] = "ring"
    """How `cp` ranks attend to one another's tokens: keys and values go round, or heads are dealt out (as far as there are
    heads for every rank; the rest goes round)."""
    data_parallel: Literal["shard", "replicate"] = "shard"
    """Over `dp`: shard parameters, gradients and optimizer state (FSDP2), or keep a replica on every lane."""
    lr: PositiveFloat | None = None
    """Peak learning rate of this module; the run's `train.lr` if left out."""
    layers: tuple[PositiveInt, ...] | None = None
    """Transformer blocks of each pipeline stage (with virtual stages: of each of those), first to last; balanced by cost if
    left out."""
    max_in_flight: PositiveInt | None = None
    """Most microbatches whose activations a rank of this module may hold at once; a schedule that would hold more is refused."""
    frozen: bool | tuple[str, ...] = False
    """Not trained: the whole module, or its parameters whose full name contains one of these texts."""

    @model_validator(mode="before")
    @classmethod
    def _fill_dp(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "dp" in data:
            return data
        try:
            ranks = len(_ranks_from_text(data["ranks"]))
            others = 1
            for axis in ("pp", "cp", "tp", "replicas"):
                others *= int(data.get(axis, 1))
        except (KeyError, TypeError, ValueError):
            return data | {"dp": 1}  # the wrong key gets its own message
        return data | {"dp": max(1, ranks // max(1, others))}

    @model_validator(mode="after")
    def _sizes_fill_ranks(self) -> "ModuleConfig":
        twice = sorted(rank for rank, count in Counter(self.ranks).items() if count > 1)
        if twice:
            raise ValueError(f"ranks {twice} are listed twice; every rank holds one position of a module's layout")
        if list(self.ranks) != sorted(self.ranks):
            # torch numbers a process group's ranks in ascending order, whatever order a mesh lists them in.
            raise ValueError(f"ranks {list(self.ranks)} must ascend; write {sorted(self.ranks)}")
        sizes = {axis: getattr(self, axis) for axis in ("pp", "dp", "replicas", "cp", "tp")}
        product = 1
        for size in sizes.values():
            product *= size
        if product != len(self.ranks):
            shown = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "dp")
            raise ValueError(
                f"{shown} = {product} ranks, but `ranks` lists {len(self.ranks)}; change a size or the ranks so that they agree"
            )
        return self


class DataConfig(_Strict):
    """What is read."""

    source: Literal["llava_json", "digits", "synthetic"]
    """`llava_json`: LLaVA-style JSON or JSONL with an image folder; `digits`: the demo; `synthetic`: random samples."""
    path: Path | None = None
    """`llava_json`: the JSON or JSONL file."""
    images: Path | None = None
    """`llava_json`: the folder that image names are relative to; the file's own folder if left out."""
    eval_path: Path | None = None
    """`llava_json`: held-out samples, evaluated at the end."""
    samples: PositiveInt | None = None
    """`digits` and `synthetic`: number of training samples."""
    eval_samples: NonNegativeInt = 0
    """`digits` and `synthetic`: number of held-out samples, evaluated at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """A missing or broken media file: skip its sample on all ranks alike (named and counted), or stop."""

    @model_validator(mode="after")
    def _keys_fit_the_source(self) -> "DataConfig":
        of_files, of_generated = {"path", "images", "eval_path"}, {"samples", "eval_samples"}
        unused = sorted((of_generated if self.source == "llava_json" else of_files) & self.model_fields_set)
        if unused:
            raise ValueError(f"{', '.join(unused)}: source {self.source} does not read this; take it out or change the source")
        if self.source == "llava_json":
            if self.path is None:
                raise ValueError("source llava_json needs `path`, the JSON or JSONL file")
            for key in ("path", "images", "eval_path"):
                value = getattr(self, key)
                if value is not None and not value.exists():
                    raise ValueError(f"{key} {str(value)!r} does not exist (looked in {Path.cwd()})")
                if value is not None and value.is_dir() != (key == "images"):
                    raise ValueError(f"{key} {str(value)!r} is a {'folder' if value.is_dir() else 'file'}, not what is expected")
        return self


class ScheduleConfig(_Strict):
    """In which order ranks work a step."""

    encoders: Literal["auto", "three_phase", "graph_1f1b", "nested"] = "auto"
    """How encoder work joins the language model's pipeline. `three_phase`: before and after it, macro-batch by macro-batch;
    `graph_1f1b`: as further stages of one pipeline; `nested`: inside its bubbles. `auto`: `three_phase` where every encoder rank
    is a language rank and every language rank an encoder rank, else `graph_1f1b`."""
    language: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order inside the language model's pipeline."""
    virtual_stages: PositiveInt = 2
    """`interleaved`: pieces of the language model that each of its ranks holds."""
    macro_batch: PositiveInt | None = None
    """`three_phase`, `graph_1f1b`: language-model microbatches that one encoder pass serves; left out, it is all of them for
    `three_phase` before a pipeline, else one."""


class TrainConfig(_Strict):
    """The loop and the optimizer (AdamW, linear warm-up, cosine decay)."""

    steps: PositiveInt
    batch_size: PositiveInt
    """Samples of one step, over all lanes and microbatches."""
    microbatches: PositiveInt = 1
    """Parts a step is worked in, one after the other; their gradients are added up."""
    pack: bool = False
    """Lay the samples of a lane's microbatch one behind the other in one sequence, each attending within itself, instead of in
    rows padded to the longest; sequences that are cut over `cp` or `tp` always are."""
    max_tokens: PositiveInt | None = None
    """Packed, in training: tokens that a lane's sequence of one microbatch may hold. A step that does not fit is refused; a
    sample that alone is longer counts as unreadable (`data.on_error`). Left out, sequences are as long as they come, but even."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate as a share of the peak."""
    warmup_steps: NonNegativeInt = 0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """Applied to matrices, not to biases and norms."""
    router_aux_loss: NonNegativeFloat | None = None
    """Models with experts: coefficient of the loss that keeps their load even (`model/routing.py` defines it; it is 1 where the
    load is even). Left out, the model's own `router_aux_loss_coef` if its config sets `output_router_logits`, else 0."""
    router_aux_scope: Literal["lane", "microbatch"] = "lane"
    """Tokens over which the load shall be even: one lane's microbatch, or all lanes of a microbatch."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Bound of the one global gradient norm over all modules; null turns clipping off."""
    log_every: PositiveInt = 10
    """Steps between log lines."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "TrainConfig":
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than steps={self.steps}; the peak would never be reached")
        return self


class RunConfig(_Strict):
    """One run: the model, a layout and ranks per module, data, training."""

    model: Path
    """Local Hugging Face model folder."""
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


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and applies overrides of the form `modules.vision.dp=2`.

    Paths in the run file are relative to the current folder.

    Raises:
        ConfigError: the file is missing or no YAML mapping, an override is malformed, or any key or value is wrong;
            one message lists them all.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such run file (looked in {Path.cwd()})") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a run file is a mapping with keys such as model, modules and train; got {type(tree).__name__}"
        )
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, where=str(path))


def parse_config(tree: dict[str, Any], where: str = "run configuration") -> RunConfig:
    """Checks a mapping as read from a run file.

    Raises:
        ConfigError: any key or value is wrong; one message lists them all.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(dict(detail)) for detail in error.errors()]
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as modules.vision.dp=2")
    *parents, last = key.strip().split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is {child!r}, which has no keys inside")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value: {error}") from error


def _describe(detail: dict[str, Any]) -> str:
    """One line for one wrong key: where, what, which value, how to fix."""
    location = tuple(part for part in detail["loc"] if not str(part).startswith(("function-", "tuple[")))
    where = ".".join(str(part) for part in location) or "run file"
    match detail["type"]:
        case "extra_forbidden":
            known = _known_keys(location[:-1])
            near = get_close_matches(str(location[-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            return f"{where}: unknown key; {hint}"
        case "model_type" | "dict_type":
            return f"{where}: expected keys with values, got {detail['input']!r}"
        case "missing":
            return f"{where}: this key is required"
        case "value_error":
            return f"{where}: {detail['ctx']['error']}"
        case _:
            return f"{where}: {detail['msg']} (got {detail['input']!r})"


def _known_keys(location: Sequence[Any]) -> list[str]:
    nested: dict[str, type[BaseModel]] = {
        "modules": ModuleConfig,
        "data": DataConfig,
        "schedule": ScheduleConfig,
        "train": TrainConfig,
    }
    model: type[BaseModel] = RunConfig
    for part in location:
        model = nested.get(str(part), model)
    return sorted(model.model_fields)
