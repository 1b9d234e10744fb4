"""When does a layout of its own pay for the encoder? Homogeneous, colocated and non-colocated layouts of a long fused sequence.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/heterogeneous.py

Four processes train a Qwen3-VL of made-up size on sequences of text and images, of several lengths and shares of media tokens.
The language model cuts its sequence over 4 ranks (`cp 4`); the encoder has what a homogeneous run can give it, or lanes or ranks
of its own. All layouts of a length take their steps in turn, in the same processes, on the same samples, which are there before
the clock starts; a step is forward, backward, sums of gradients and the update. Losses are compared, so that no layout does less.
What makes a sequence long is its length over the model's width: attention then outweighs the matrices.

Where there are fewer cores than processes, a step takes as long as the work of all ranks together: work that is repeated or added
shows in full, a rank that waits costs nothing. CPU seconds are printed beside, which do not depend on who waits for whom: of all
ranks together, and the least that a step would take if every rank had a core to itself.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
import typer
from heterogeneous_report import Case, Kind, Result, Row, Step, report
from rich.console import Console
from stepping import Training, build_training, with_data
from torch import Tensor
from transformers import PreTrainedConfig, Qwen3VLConfig

from meshweave.batch.plan import MediaMeta
from meshweave.config import LANGUAGE, RunConfig, parse_config
from meshweave.data.synthetic import SyntheticDataset
from meshweave.data.synthetic_media import Item, Patches
from meshweave.layout import placements
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.flops import count_flops
from meshweave.model.modules import graph_of
from meshweave.parallel.mesh import build_meshes
from meshweave.step.schedules import typical_step
from meshweave.train.trainer import step_flops
from meshweave.world import World, launch

RANKS = 4
EVERYONE = f"0-{RANKS - 1}"
SEQUENCES = RANKS
"""Of a step: one a lane with `dp 4`, otherwise microbatches of one."""
LENGTHS = (1024, 4096)
SHARES = (0.2, 0.5, 0.8)
TOLERANCE = 1e-4
"""Of losses, relative, in float32."""


@dataclass(frozen=True)
class Contender:
    """One layout of both modules."""

    kind: Kind
    label: str
    vision: Mapping[str, Any]
    language: Mapping[str, Any]


def _shared(kind: Kind, label: str, vision: Mapping[str, int], language: Mapping[str, int]) -> Contender:
    return Contender(kind, label, {"ranks": EVERYONE, **vision}, {"ranks": EVERYONE, **language})


def _apart(encoders: int) -> Contender:
    rest = RANKS - encoders
    vision, language = f"dp {encoders}" if encoders > 1 else "1 rank", f"cp {rest}"
    ranks = f"0-{encoders - 1}" if encoders > 1 else 0
    label = f"vision {vision}, language {language} on {rest} others"
    return Contender(Kind.APART, label, {"ranks": ranks, "dp": encoders}, {"ranks": f"{encoders}-{RANKS - 1}", "cp": rest})


CONTENDERS = (
    _shared(Kind.HOMOGENEOUS, "vision repeated 4 ×, language cp 4", {"replicas": 4}, {"cp": 4}),
    _shared(Kind.HOMOGENEOUS, "vision tp 4, language cp 4", {"tp": 4}, {"cp": 4}),
    _shared(Kind.HOMOGENEOUS, "vision tp 2, repeated 2 ×, language cp 4", {"tp": 2, "replicas": 2}, {"cp": 4}),
    _shared(Kind.HOMOGENEOUS, "vision tp 2, repeated 2 ×, language tp 2 cp 2", {"tp": 2, "replicas": 2}, {"tp": 2, "cp": 2}),
    _shared(Kind.COLOCATED, "vision dp 4, language cp 4", {"dp": 4}, {"cp": 4}),
    _shared(Kind.CUT_ALIKE, "vision cp 4, language cp 4", {"cp": 4}, {"cp": 4}),
    _apart(1),
    _apart(2),
    _shared(Kind.UNCUT, "dp 4 for both", {"dp": 4}, {"dp": 4}),
    _shared(Kind.UNCUT, "tp 4 for both", {"tp": 4}, {"tp": 4}),
)


def bench_model(width: int, layers: int) -> PreTrainedConfig:
    """Encoder and language model of equal depth and width; 4 patches and two tensors (one of deepstack) a media token."""
    side = width // 4
    vision = {
        "depth": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": width,
        "num_position_embeddings": 1024,
        "deepstack_visual_indexes": [layers // 2],
    }
    text = {
        "vocab_size": 1024,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": side,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [side // 2 - 2 * (side // 6), side // 6, side // 6],
            "rope_theta": 1e6,
        },
    }
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return Qwen3VLConfig(vision_config=vision, text_config=text, **tokens)


class LongDataset(SyntheticDataset):
    """Random sequences of one length, in which equal images come at equal distances and all positions but images are targets.

    Pixels are drawn once, and are the same for every image: reading costs nothing.
    """

    def __init__(self, config: PreTrainedConfig, samples: int, length: int, share: float, image_side: int) -> None:
        """
        Args:
            length: tokens of a sequence.
            share: of its tokens that are media tokens, to the nearest image.
            image_side: media tokens along each side of an image.
        """
        super().__init__(config, samples)
        media = next(kind for kind in self._media if isinstance(kind, Patches) and not kind.video)
        side, tokens = media.merge * image_side, image_side**2
        meta = MediaMeta(media.module, tokens, cost=float(side**2), grid=(1, side, side))
        shapes, grid = {"pixel_values": (side**2, media.values)}, {"image_grid_thw": torch.tensor([meta.grid])}
        self._image = Item(media.frame.around(media.token, tokens), meta, shapes, grid)
        images = max(1, round(share * length / tokens))
        text = length - images * len(self._image.ids)
        if text < images + 1:
            raise typer.BadParameter(f"{images} images of {tokens} tokens do not fit into {length} tokens; lower --shares")
        ends = [text * number // (images + 1) for number in range(images + 2)]
        self._texts = [stop - start for start, stop in pairwise(ends)]
        self._pixels = self._image.inputs(torch.randn)
        self.share = images * tokens / length

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        input_ids = torch.tensor(self._ids(index), dtype=torch.int64)
        return input_ids, input_ids.masked_fill(input_ids == self._placeholders["image"], -100)

    def media(self, index: int, slot: int) -> dict[str, Tensor]:
        return self._pixels

    def _draw(self, index: int) -> tuple[list[int], list[Item]]:
        return self._texts, [self._image] * (len(self._texts) - 1)


@dataclass(frozen=True)
class Options:
    """What all layouts have in common."""

    steps: int
    macro_batch: int
    context_parallel: str
    data_parallel: str


def run_of(contender: Contender, folder: Path, options: Options) -> RunConfig:
    """A run of this layout: `SEQUENCES` a step, one a lane in each microbatch."""
    microbatches = SEQUENCES // int(contender.language.get("dp", 1))
    kept = {"data_parallel": options.data_parallel}
    language = {**contender.language, **kept, "context_parallel": options.context_parallel}
    # Apart, an encoder that serves one microbatch after another lets the language model begin early.
    macro_batch = 1 if contender.kind == Kind.APART else min(options.macro_batch, microbatches)
    return parse_config(
        {
            "model": str(folder),
            "weights": "seeded",
            "modules": {"vision": {**contender.vision, **kept}, LANGUAGE: language},
            "schedule": {"macro_batch": macro_batch},
            "train": {"steps": options.steps, "batch_size": SEQUENCES, "microbatches": microbatches},
        }
    )


def time_cases(
    world: World, _: RunConfig, runs: Sequence[RunConfig], config: PreTrainedConfig, datasets: Sequence[LongDataset], rounds: int
) -> list[list[list[Step]]]:
    """By dataset, run and round: every counted step. The first of each run, on the last of the datasets, warms up."""
    trainings = [_training(world, run, config, datasets[-1]) for run in runs]
    for training in trainings:
        _timed(training, 0)
    cases = [[with_data(training, config, dataset) for training in trainings] for dataset in datasets]
    steps: list[list[list[Step]]] = [[[] for _ in runs] for _ in datasets]
    for number in range(rounds):
        for case, of_case in zip(cases, steps, strict=True):
            for training, its in zip(case, of_case, strict=True):
                its.append(_timed(training, number))
    return steps


def _training(world: World, run: RunConfig, config: PreTrainedConfig, dataset: LongDataset) -> Training:
    """Several runs live in one world: each gets its own meshes."""
    where = placements(run)
    return build_training(replace(world, placements=where, meshes=build_meshes(where, world.device.type)), run, config, dataset)


def _timed(training: Training, number: int) -> Step:
    """One step. Its data is there before the clock starts, and no rank starts before all are ready."""
    local = training.loader.step(number)
    dist.barrier()
    link_bytes = _loopback_bytes()
    cpu, began = time.process_time(), time.perf_counter()
    totals = training.take(local)
    mine = torch.tensor([began, time.perf_counter(), time.process_time() - cpu], dtype=torch.float64)
    every = [torch.empty_like(mine) for _ in range(training.world.size)]
    dist.all_gather(every, mine)
    starts, ends, busy = torch.stack(every).unbind(dim=1)
    moved = _loopback_bytes()
    crossed = sum(sum(both) for both in totals.crossed.values()) * sum(training.travel.widths["vision"])
    return Step(
        seconds=float(ends.max() - starts.min()),
        cpu_seconds=tuple(busy.tolist()),
        boundary_bytes=crossed * training.travel.dtype.itemsize,
        link_bytes=None if moved is None or link_bytes is None else moved - link_bytes,
        loss=totals.loss,
    )


def _loopback_bytes() -> int | None:
    """What this machine has sent to itself so far; None where the system does not tell."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    found = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(found[0][0]) if found else None


def case_of(length: int, dataset: LongDataset, run: RunConfig, config: PreTrainedConfig) -> Case:
    """What all layouts of a case have in common."""
    graph = graph_of(blueprint_of(config, STORED[run.dtype]))
    flops = step_flops(typical_step(run, dataset), {name: count_flops(graph, name) for name in run.modules})
    return Case(length, dataset.share, len(dataset.meta(0).media), SEQUENCES, flops["vision"], flops[LANGUAGE])


def _turns(run: RunConfig) -> tuple[tuple[int, ...], ...]:
    """Sets of ranks that work on a microbatch one after another."""
    return tuple(dict.fromkeys(module.ranks for module in run.modules.values()))


def main(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", help="Tokens of a sequence; may be given several times.")
    ] = None,
    shares: Annotated[
        list[float] | None, typer.Option("--share", help="Of them, media tokens; may be given several times.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Counted steps of every layout.")] = 3,
    width: Annotated[int, typer.Option(help="Hidden size of both modules.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers of each module.")] = 2,
    image_side: Annotated[int, typer.Option(help="Media tokens along each side of an image.")] = 8,
    macro_batch: Annotated[int, typer.Option(help="Microbatches of an encoder pass on shared ranks.")] = SEQUENCES,
    context_parallel: Annotated[str, typer.Option(help="How cp ranks attend: ring or ulysses.")] = "ulysses",
    data_parallel: Annotated[str, typer.Option(help="Parameters over dp and cp: replicate or shard.")] = "replicate",
    quick: Annotated[bool, typer.Option(help="One short case, two rounds.")] = False,
    markdown: Annotated[bool, typer.Option(help="Print what a README takes instead of tables for a terminal.")] = False,
) -> None:
    """Measures every case and prints it, then says where heterogeneity paid."""
    transformers.utils.logging.set_verbosity_error()
    console = Console(width=180, highlight=False)
    if quick:
        lengths, shares, rounds = lengths or [1024], shares or [0.5], 2
    shares = sorted(shares or SHARES)
    config = bench_model(width, layers)
    results = []
    with tempfile.TemporaryDirectory() as name:
        config.save_pretrained(name)
        options = Options(1 + rounds * len(shares), macro_batch, context_parallel, data_parallel)
        runs = [run_of(each, Path(name), options) for each in CONTENDERS]
        for length in lengths or LENGTHS:
            datasets = [LongDataset(config, SEQUENCES * rounds, length, share, image_side) for share in shares]
            started, load = time.perf_counter(), os.getloadavg()[0]
            work = partial(time_cases, runs=runs, config=config, datasets=datasets, rounds=rounds)
            found = launch(runs[0], work)
            assert found is not None
            for dataset, of_case in zip(datasets, found, strict=True):
                rows = [
                    Row(each.kind, each.label, _turns(run), run.train.microbatches, run.world_size, tuple(its))
                    for each, run, its in zip(CONTENDERS, runs, of_case, strict=True)
                ]
                results.append(Result(case_of(length, dataset, runs[0], config), tuple(rows)))
            print(f"{length:,} tokens: {time.perf_counter() - started:.0f} s, load {load:.1f} before it", file=sys.stderr)
    machine = (
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores for {RANKS} processes of one thread; float32; "
        f"encoder and language model of {layers} layers of width {width}, images of {image_side**2} media tokens; "
        f"{SEQUENCES} sequences a step, on shared ranks {macro_batch} in an encoder pass; cp: {context_parallel}, parameters "
        f"over dp: {data_parallel}; "
        f"median of {rounds} rounds in which every layout has a step of every share"
    )
    command = "OMP_NUM_THREADS=1 .venv/bin/python benchmarks/heterogeneous.py " + " ".join(sys.argv[1:])
    report(console, results, machine, command.strip(), markdown)
    if max(result.disagreement for result in results) > TOLERANCE:
        print("layouts disagree on the loss: the figures above compare different work", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
