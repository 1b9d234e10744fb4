"""A model cut into stages computes what the whole one does, bit for bit; bad cuts are refused by name."""

import copy
from collections.abc import Sequence
from functools import cache
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import CONFIGS, llava, qwen3_vl, with_layers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, Gemma3TextConfig, LlavaConfig, PreTrainedConfig, PreTrainedModel

from meshweave.batch.plan import MediaMeta
from meshweave.config import LANGUAGE, RunConfig, parse_config
from meshweave.data.join import join_media
from meshweave.data.synthetic import SyntheticDataset
from meshweave.errors import LayoutError
from meshweave.model.blueprint import blueprint_of
from meshweave.model.encoder import EncoderStage, received_shapes
from meshweave.model.language import LanguageStage
from meshweave.model.loss import next_tokens, token_loss
from meshweave.model.modules import VISION, ModelGraph, graph_of
from meshweave.model.parts import parts_of
from meshweave.model.stages import cut_blocks, stage_costs, stage_cuts
from meshweave.sequence.grid import UNCUT, lay_out
from meshweave.verification.oracle import stock_batch

VISION_LAYERS, LANGUAGE_LAYERS = 4, 5
TEXT_ONLY, IMAGES = (1, 5), (0, 1, 2, 3)
"""Samples of a `SyntheticDataset`: none with images, and with one, none, a few and seven."""


def config_of(family: str) -> PreTrainedConfig:
    if family == "llava_of_gemma":
        return sliding_windows()
    if family == "llava_of_three_layers":
        config = with_layers(llava(), VISION_LAYERS, LANGUAGE_LAYERS)
        config.vision_feature_layer = [-3, -1, 3]
        return config
    return with_layers(CONFIGS[family](), VISION_LAYERS, LANGUAGE_LAYERS)


def sliding_windows() -> PreTrainedConfig:
    """A language model whose layers are of two types, and whose forward scales the embeddings."""
    text = Gemma3TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LANGUAGE_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    )
    vision = with_layers(llava(), VISION_LAYERS, LANGUAGE_LAYERS).vision_config
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=5, tie_word_embeddings=True)


FAMILIES = [*CONFIGS, "llava_of_gemma", "llava_of_three_layers"]


@cache
def stock(family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_config(config_of(family), dtype=torch.float32, attn_implementation="sdpa")
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    return model.train()


class Images(SyntheticDataset):
    """Without videos: the stock model encodes these apart, which sums gradients in another order."""

    def __init__(self, config: PreTrainedConfig, samples: int) -> None:
        super().__init__(config, samples)
        self._media = self._media[:1]


class Batch:
    """Padded texts, and the media of all of them."""

    def __init__(self, config: PreTrainedConfig, samples: Sequence[int]) -> None:
        data = Images(config, 8)
        texts = [data.text(sample) for sample in samples]
        self.ids = pad_sequence([ids for ids, _ in texts], batch_first=True)
        self.labels = pad_sequence([labels for _, labels in texts], batch_first=True, padding_value=-100)
        self.items: list[MediaMeta] = [item for sample in samples for item in data.meta(sample).media]
        self.inputs = join_media([data.media(sample, slot) for sample in samples for slot in range(len(data.meta(sample).media))])
        self.grid = lay_out([data.meta(sample) for sample in samples], UNCUT)


@cache
def expected(family: str, samples: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the stock model, not cut."""
    model = copy.deepcopy(stock(family))
    inputs, labels = stock_batch(model, Images(model.config, 8), samples)
    del inputs["attention_mask"]  # bit for bit: attention with a mask rounds otherwise
    loss = token_loss(model(**inputs, use_cache=False).logits, next_tokens(labels))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def even(stop: int, stages: int, start: int = 0) -> tuple[range, ...]:
    bounds = [start + round((stop - start) * stage / stages) for stage in range(stages + 1)]
    return tuple(range(*pair) for pair in pairwise(bounds))


def crossing(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What arrives on another rank: the values, without the graph."""
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def run_cut(
    graph: ModelGraph, batch: Batch, vision: Sequence[range], language: Sequence[range]
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Loss, with gradients left on the parameters, and what each later encoder stage received."""
    encoders = [EncoderStage(graph, VISION, blocks) for blocks in vision]
    languages = [LanguageStage(graph, blocks) for blocks in language]
    ends: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []
    received: tuple[Tensor, ...] = ()
    arrived = []
    if batch.inputs:
        for stage in encoders:
            later = {key: value for key, value in batch.inputs.items() if key != "pixel_values"}
            out = stage(batch.inputs if stage.first else later, received)
            received = crossing(out)
            arrived.append(received)
            ends.append((out, received))
    hidden = None
    media = {VISION: received} if received else None
    for piece in languages[:-1]:
        out = piece(batch.ids, batch.grid, media if piece.first else None, batch.items, hidden)
        (hidden,) = crossing([out])
        ends.append(([out], [hidden]))
    last = languages[-1]
    loss, exact = last(batch.ids, batch.grid, media if last.first else None, batch.items, hidden, batch.labels)
    assert exact is None
    loss.backward()
    for out, after in reversed(ends):
        pairs = [(mine, theirs.grad) for mine, theirs in zip(out, after, strict=True) if theirs.grad is not None]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    return loss.detach(), arrived[:-1]


@pytest.mark.parametrize("samples", [IMAGES, TEXT_ONLY], ids=["images", "text only"])
@pytest.mark.parametrize(("encoder", "language"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_has_the_loss_and_gradients_of_the_whole(
    family: str, encoder: int, language: int, samples: tuple[int, ...]
) -> None:
    vision = even(VISION_LAYERS, encoder)
    if family == "llava_of_three_layers" and encoder > 1:
        # The last stage must begin at block 2, whose input is selected.
        vision = (*even(2, min(encoder - 1, 2)), range(2, VISION_LAYERS))
    # The first stage must hold blocks 0 and 1, after which features may be added.
    cut = (range(2), *even(LANGUAGE_LAYERS, language - 1, start=2)) if language > 1 else (range(LANGUAGE_LAYERS),)
    graph = graph_of(copy.deepcopy(stock(family)))
    before = {name: id(module) for name, module in graph.model.named_modules()}
    batch = Batch(graph.model.config, samples)
    loss, arrived = run_cut(graph, batch, vision, cut)
    whole_loss, whole = expected(family, samples)
    assert torch.equal(loss, whole_loss)
    found = {name: p.grad for name, p in graph.model.named_parameters() if p.grad is not None}
    assert found.keys() == whole.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, whole[name]), name
    assert {name: id(module) for name, module in graph.model.named_modules()} == before
    for blocks, tensors in zip(vision[1:], arrived, strict=bool(batch.inputs)):
        assert received_shapes(graph.model.config, "vision", blocks, batch.items) == tuple(tensor.shape for tensor in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_gradients_the_last_stage_says_which_samples_are_exact(family: str) -> None:
    graph = graph_of(copy.deepcopy(stock(family)))
    batch = Batch(graph.model.config, TEXT_ONLY)
    with torch.no_grad():
        hidden = LanguageStage(graph, range(2))(batch.ids, batch.grid)
        _, exact = LanguageStage(graph, range(2, LANGUAGE_LAYERS))(batch.ids, batch.grid, hidden=hidden, labels=batch.labels)
        _, whole = LanguageStage(graph, range(LANGUAGE_LAYERS))(batch.ids, batch.grid, labels=batch.labels)
    assert torch.equal(exact, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_holds_its_own_parameters_only(family: str) -> None:
    graph = graph_of(copy.deepcopy(stock(family)))
    for name, count in ((VISION, VISION_LAYERS), (LANGUAGE, LANGUAGE_LAYERS)):
        cut = even(count, 3)
        stages = [LanguageStage(graph, b) if name == LANGUAGE else EncoderStage(graph, name, b) for b in cut]
        held = [{id(parameter) for parameter in stage.parameters()} for stage in stages]
        assert set.union(*held) == {id(parameter) for parameter in graph.parameters(name).values()}
        tied = {id(graph.model.get_input_embeddings().weight)} if family == "llava_of_gemma" and name == LANGUAGE else set()
        assert set.union(set(), *(a & b for a, b in combinations(held, 2))) == tied


def test_a_failed_forward_leaves_nothing_behind() -> None:
    graph = graph_of(copy.deepcopy(stock("qwen3_vl")))
    batch = Batch(graph.model.config, IMAGES)
    vision, language = even(VISION_LAYERS, 2), (range(2), range(2, LANGUAGE_LAYERS))
    stage = EncoderStage(graph, VISION, vision[1])
    with pytest.raises(RuntimeError):
        stage({"image_grid_thw": batch.inputs["image_grid_thw"]}, (torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3, 5)))
    loss, _ = run_cut(graph, batch, vision, language)
    assert torch.equal(loss, expected("qwen3_vl", IMAGES)[0])


def run_of(vision: dict | None = None, language: dict | None = None, **top: object) -> RunConfig:
    modules = {}
    for name, given_ in ((VISION, vision or {}), (LANGUAGE, language or {})):
        modules[name] = {"ranks": f"0-{given_.get('pp', 1) - 1}", **given_}
    return parse_config({"model": "unused", "modules": modules, "train": {"steps": 1, "batch_size": 4}, **top})


def cuts(run: RunConfig, config: PreTrainedConfig) -> dict[str, tuple[range, ...]]:
    return stage_cuts(run, graph_of(blueprint_of(config, torch.float32)))


def test_uncut_modules_are_one_stage() -> None:
    for make in CONFIGS.values():
        config = make()
        found = cuts(run_of(), config)
        assert {name: len(its) for name, its in found.items()} == {VISION: 1, LANGUAGE: 1}


def test_interleaved_stages_count_virtual_ones() -> None:
    run = run_of(language={"pp": 2}, schedule={"language": "interleaved", "virtual_stages": 2})
    assert len(cuts(run, config_of("llava"))[LANGUAGE]) == 4


def test_layers_of_the_run_file_are_taken() -> None:
    found = cuts(run_of({"pp": 2, "layers": [3, 1]}, {"pp": 3, "layers": [2, 1, 2]}), config_of("qwen3_vl"))
    assert found == {VISION: (range(3), range(3, 4)), LANGUAGE: (range(2), range(2, 3), range(3, 5))}


def test_the_head_lightens_the_last_stage() -> None:
    config = with_layers(llava(), 4, 8)
    config.text_config.vocab_size = 1000
    lengths = [len(blocks) for blocks in cuts(run_of(language={"pp": 2}), config)[LANGUAGE]]
    assert lengths[0] > lengths[1]


def test_deepstack_layers_stay_on_the_first_stage() -> None:
    config = config_of("qwen3_vl")
    config.text_config.vocab_size = 96
    assert [len(blocks) for blocks in cuts(run_of(language={"pp": 4}), config)[LANGUAGE]] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("vision", "language", "config", "message"),
    [
        ({}, {"pp": 6}, "llava", r"modules\.language\.pp=6: more stages than the module's 5 blocks; use at most 5"),
        ({"pp": 5}, {}, "qwen2_5_vl", r"modules\.vision\.pp=5: more stages than the module's 4 blocks"),
        ({}, {"pp": 2, "layers": [2, 2, 1]}, "llava", r"modules\.language\.layers=\[2, 2, 1\]: 3 numbers for the 2 stages"),
        ({}, {"pp": 2, "layers": [2, 2]}, "llava", r"add up to 4, but the module has 5 blocks"),
        ({"layers": [3]}, {}, "llava", r"modules\.vision\.layers=\[3\]: these add up to 3, but the module has 4"),
        ({}, {"pp": 5}, "qwen3_vl", r"modules\.language\.pp=5: deepstack .* first 2 of 5 .* use at most 4 stages"),
        ({}, {"pp": 2, "layers": [1, 4]}, "qwen3_vl", r"deepstack .*make the first entry of layers=\[1, 4\] at least 2"),
        ({"pp": 4}, {}, "llava_of_three_layers", r"vision_feature_layer=\[-3, -1, 3\] .* input of block 2 .* at most 3 stages"),
        ({"pp": 2, "layers": [3, 1]}, {}, "llava_of_three_layers", r"the last entry of layers=\[3, 1\] at least 2"),
    ],
)
def test_bad_cuts_are_refused_by_name(vision: dict, language: dict, config: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        cuts(run_of(vision, language), config_of(config))


def test_an_encoder_that_nobody_knows_how_to_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.model.families.CUTS", {})
    assert len(cuts(run_of(), llava())[VISION]) == 1
    with pytest.raises(LayoutError, match=r"modules\.vision: it is not known where .* set its pp to 1"):
        cuts(run_of({"pp": 2}), llava())


def test_costs_count_every_matrix_once() -> None:
    graph = graph_of(blueprint_of(qwen3_vl(), torch.float32))
    costs = stage_costs(graph, LANGUAGE, parts_of(graph, LANGUAGE))
    assert (costs.first, costs.last) == (0, 2 * 32 * 96)
    vision = stage_costs(graph, VISION, parts_of(graph, VISION))
    tap = (128 * 128 + 128 * 32) * 2 / 4
    assert vision.blocks[0] == vision.blocks[1] == vision.blocks[2] + tap
    assert vision.last == tap


def brute_force(
    costs: Sequence[float], stages: int, first: float, last: float, first_blocks: int, last_blocks: int
) -> tuple[float, float] | None:
    found = []
    for inner in combinations(range(1, len(costs)), stages - 1):
        bounds = (0, *inner, len(costs))
        if bounds[1] < first_blocks or bounds[-1] - bounds[-2] < last_blocks:
            continue
        sums = [sum(costs[a:b]) for a, b in pairwise(bounds)]
        sums[0] += first
        sums[-1] += last
        found.append((max(sums), sum(value**2 for value in sums)))
    return min(found, default=None)


@given(
    costs=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    stages=st.integers(1, 5),
    ends=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    least=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_cuts_are_the_best_there_are(costs: list[int], stages: int, ends: tuple[int, int], least: tuple[int, int]) -> None:
    best = brute_force(costs, stages, *ends, *least)
    options = {"first_cost": ends[0], "last_cost": ends[1], "first_blocks": least[0], "last_blocks": least[1]}
    if best is None:
        with pytest.raises(LayoutError, match="do not make"):
            cut_blocks(costs, stages, **options)
        return
    found = cut_blocks(costs, stages, **options)
    assert [number for blocks in found for number in blocks] == list(range(len(costs)))
    assert len(found) == stages and all(found)
    sums = [sum(costs[number] for number in blocks) for blocks in found]
    sums[0] += ends[0]
    sums[-1] += ends[1]
    assert (max(sums), sum(value**2 for value in sums)) == best
