"""Position ids are those of the model's own forward; what a slice of a sequence is given depends on that slice alone."""

from functools import cache
from typing import Any

import pytest
import torch
from support.families import FAMILIES
from torch import Tensor, nn
from transformers import PreTrainedModel

from meshweave.batch.plan import MediaMeta
from meshweave.data.synthetic import SyntheticDataset
from meshweave.model.blueprint import auto_class
from meshweave.model.inputs import merge_inputs, merge_sounds, position_ids
from meshweave.model.modules import AUDIO, VISION
from meshweave.verification.oracle import stock_batch

SAMPLES = (0, 1, 2, 3)


@cache
def model(family: str) -> PreTrainedModel:
    config = FAMILIES[family]()
    found: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    return found.eval()


def data(family: str) -> SyntheticDataset:
    return SyntheticDataset(FAMILIES[family](), 8, most_items=3)


def items(family: str) -> list[MediaMeta]:
    return [item for sample in SAMPLES for item in data(family).meta(sample).media]


class Seen(Exception):  # noqa: N818 - no error: how a forward ends early
    """Ends a forward at its language model."""


def given_to_language_model(family: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the base model's own forward hands to its language model."""
    seen: dict[str, Any] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise Seen

    handle = model(family).base_model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad(), pytest.raises(Seen):
            model(family).base_model(**inputs)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_position_ids_are_the_models_own(family: str) -> None:
    inputs, _ = stock_batch(model(family), data(family), SAMPLES)
    ours = position_ids(model(family).base_model, inputs["input_ids"], items(family))
    theirs = given_to_language_model(family, inputs).get("position_ids")
    if ours is None:  # the model leaves it to the default, or writes that itself
        assert theirs is None or torch.equal(theirs, torch.arange(inputs["input_ids"].shape[1]).expand_as(theirs))
        return
    filled = inputs["attention_mask"].bool()
    assert torch.equal(ours[:, filled], theirs[:, filled])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_5_omni"])
def test_position_ids_of_text_alone_ascend(family: str) -> None:
    ids = data(family).text(1)[0][None]
    found = position_ids(model(family).base_model, ids, [])
    assert found is not None
    assert torch.equal(found, torch.arange(ids.shape[1]).expand(3, 1, -1))


def rows(family: str, ids: Tensor, width: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Encoder to made-up tokens, told apart by their numbers, and the places they belong to."""
    config = model(family).config
    found = {}
    for encoder, keys in ((VISION, ("image_token_id", "video_token_id")), (AUDIO, ("audio_token_id",))):
        tokens = [token for key in keys if (token := getattr(config, key, None)) is not None]
        places = torch.isin(ids, torch.tensor(tokens)) if tokens else torch.zeros_like(ids, dtype=torch.bool)
        if places.any():
            count = int(places.sum())
            found[encoder] = torch.arange(1.0, count + 1).unsqueeze(1).expand(count, width) * 1000, places
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_are_embedded_as_the_whole_is(family: str) -> None:
    """Three slices of every row, the borders inside media items: embeddings with media, and types, are those of the whole."""
    base: Any = model(family).base_model
    inputs, _ = stock_batch(model(family), data(family), SAMPLES)
    ids, width = inputs["input_ids"], model(family).config.get_text_config().hidden_size
    media = rows(family, ids, width)
    third = ids.shape[1] // 3 + 1

    def embedded(first: int, stop: int) -> Tensor:
        part = ids[:, first:stop]
        falling = {}
        for encoder, (tokens, places) in media.items():
            numbers = places.flatten().cumsum(0).view_as(places) - 1
            falling[encoder] = tokens[numbers[:, first:stop][places[:, first:stop]]]
        extra = merge_inputs(base, part, {name: (tokens,) * 3 for name, tokens in falling.items() if len(tokens)})
        sounds = falling.get(AUDIO)

        def write(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output if sounds is None or not len(sounds) else merge_sounds(base, part, output, sounds)

        handle = base.get_input_embeddings().register_forward_hook(write)
        try:
            found: Tensor = given_to_language_model(family, {"input_ids": part, "use_cache": False, **extra})["inputs_embeds"]
        finally:
            handle.remove()
        return found

    whole = embedded(0, ids.shape[1])
    parts = [embedded(first, min(first + third, ids.shape[1])) for first in range(0, ids.shape[1], third)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    for tokens, places in media.values():
        assert torch.equal(whole[places], tokens)
