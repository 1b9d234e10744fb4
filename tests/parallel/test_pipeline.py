"""Stages on different ranks, sharded and split, have together the loss and gradients of the stock model."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from support.models import CONFIGS, llava, with_layers
from support.ranks import run_ranks
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig, parse_config
from meshweave.data.synthetic import SyntheticDataset
from meshweave.layout import placements
from meshweave.model.encoder import received_shapes
from meshweave.model.language import token_loss
from meshweave.model.modules import VISION, media_widths
from meshweave.parallel.build import build_model
from meshweave.parallel.gather import whole
from meshweave.parallel.mesh import build_meshes
from meshweave.train.gradients import sum_partial_gradients

LANES = ((0, 1), (2, 4))
"""Samples of each lane; every lane has images."""


def run_of(sizes: dict, **top: object) -> RunConfig:
    modules = {
        name: {"ranks": f"0-{sizes['pp'] * sizes.get('dp', 1) * sizes.get('tp', 1) - 1}", **sizes} for name in (VISION, LANGUAGE)
    }
    train = {"steps": 1, "batch_size": 4}
    return parse_config(
        {"model": "unused", "weights": "seeded", "dtype": "float64", "modules": modules, "train": train, "seed": 5, **top}
    )


def texts_and_media(config: PreTrainedConfig, samples: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Tensor], list]:
    data = SyntheticDataset(config, 8)
    texts = [data.text(sample) for sample in samples]
    slots = [(sample, slot) for sample in samples for slot in range(len(data.meta(sample).media))]
    media = [data.media(*slot) for slot in slots]
    inputs = {key: torch.cat([item[key] for item in media]) for key in media[0]}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    return (
        pad_sequence([ids for ids, _ in texts], batch_first=True),
        pad_sequence([labels for _, labels in texts], batch_first=True, padding_value=-100),
        inputs,
        [data.meta(sample).media[slot] for sample, slot in slots],
    )


def pipelined(
    rank: int, run: RunConfig, config: PreTrainedConfig
) -> tuple[float, dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Loss of this rank, its parameters, their gradients, and which of them another rank holds, too."""
    placed = placements(run)
    meshes = build_meshes(placed, "cpu")
    model = build_model(run, config, placed, meshes, rank, torch.device("cpu"))
    place = placed[LANGUAGE]
    lane, (first, last) = place.lane(rank), place.group(rank, "pp")
    ids, labels, inputs, items = texts_and_media(config, LANES[lane])
    grids = inputs.get("image_grid_thw")
    encoder, language = (model.modules[name].stages[int(rank == last)] for name in (VISION, LANGUAGE))
    tokens = sum(item.tokens for item in items)
    media_shapes = [(tokens, width) for width in media_widths(config)]
    hidden_shape = (*ids.shape, config.get_text_config().hidden_size)

    def receive(shapes: Sequence[tuple[int, ...]], peer: int) -> tuple[Tensor, ...]:
        found = tuple(torch.empty(shape, dtype=torch.float64) for shape in shapes)
        for tensor in found:
            dist.recv(tensor, peer)
        return tuple(tensor.requires_grad_() for tensor in found)

    def send(tensors: Sequence[Tensor], peer: int) -> None:
        for tensor in tensors:
            dist.send(tensor.detach().contiguous(), peer)

    loss = torch.zeros(())
    if rank == first:
        features = encoder(inputs)
        send(features, last)
        media = receive(media_shapes, last)
        hidden = language(ids, media, grids)
        send([hidden], last)
        hidden.backward(receive([hidden_shape], last)[0].detach())
        send([tensor.grad for tensor in media], last)
        arrived = receive([tuple(tensor.shape) for tensor in features], last)
        torch.autograd.backward(list(features), [tensor.detach() for tensor in arrived])
    else:
        received = receive(received_shapes(config, model.cuts[VISION][1], items), first)
        later = {key: value for key, value in inputs.items() if key != "pixel_values"}
        features = encoder(later, received)
        send(features, first)
        (hidden,) = receive([hidden_shape], first)
        loss, _ = language(ids, grids=grids, hidden=hidden, labels=labels)
        loss.backward()
        send([hidden.grad], first)
        arrived = receive(media_shapes, first)
        torch.autograd.backward(list(features), [tensor.detach() for tensor in arrived])
        send([tensor.grad for tensor in received], first)
    values, gradients, copies = {}, {}, set()
    for name, module in model.modules.items():
        sum_partial_gradients(module, meshes[name])
        values |= {key: whole(value) for key, value in module.parameters.items()}
        gradients |= {key: whole(value.grad) for key, value in module.parameters.items() if value.grad is not None}
        copies |= module.copies
    return loss.item(), values, gradients, copies


@pytest.mark.parametrize("sizes", [{"pp": 2, "dp": 2}, {"pp": 2, "tp": 2}], ids=["dp 2", "tp 2"])
@pytest.mark.parametrize("family", [*CONFIGS, "llava tied"])
def test_two_stages_have_the_loss_and_gradients_of_the_stock_model(family: str, sizes: dict) -> None:
    config = with_layers(llava(tied=True) if family == "llava tied" else CONFIGS[family](), 4, 5)
    found = run_ranks(4, pipelined, run_of(sizes), config)
    stock = AutoModelForImageTextToText.from_config(config, dtype=torch.float64, attn_implementation="sdpa").train()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.copy_(next(values[name] for _, values, _, _ in found if name in values))
    loss = torch.zeros((), dtype=torch.float64)
    for samples in LANES[: sizes.get("dp", 1)]:
        ids, labels, inputs, _ = texts_and_media(config, samples)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        loss = loss + token_loss(stock(input_ids=ids, use_cache=False, **inputs).logits, labels)
    loss.backward()
    # The last stage's ranks are 2 and 3: two lanes, or one that two ranks repeat.
    assert (found[2][0] + found[3][0]) / sizes.get("tp", 1) == pytest.approx(loss.item(), rel=1e-9)
    for name, parameter in stock.named_parameters():
        first = [gradients[name] for _, _, gradients, copies in found[::2] if name in gradients and name not in copies]
        second = [gradients[name] for _, _, gradients, copies in found[::2] if name in gradients and name in copies]
        if parameter.grad is None:
            assert not first and not second, name
            continue
        torch.testing.assert_close(sum(first + second), parameter.grad, rtol=1e-9, atol=1e-12)
        assert len(first) == 1 and len(second) == (family == "llava tied" and "embed_tokens" in name), name
