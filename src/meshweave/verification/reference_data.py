"""What do the stock processor and template make of a sample, and which tokens of it are targets? Written once more, and simply.

`data/targets.py` documents the rules. Here answers are found by rendering what comes before each with the generation prompt, and
pixels and ids come from the stock processor's own call on the whole sample. `SHARED` says what both sides have in common.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meshweave.data.dataset import IGNORE, RawSample
from meshweave.data.processed import ProcessedDataset

SHARED = (
    "reading of records and pictures, limits of the run file, the processor that was loaded, which tokens end an answer, which "
    "parameters are frozen; and the ids of samples that speak of a mark (<image>) which the tokenizer has a token for"
)
"""What a comparison on data from files does not cover."""
_MARKS = ("<image>", "<video>", "<audio>")


def stock_sample(dataset: ProcessedDataset, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Ids and labels `[tokens]` and the encoder's inputs of one sample, from the stock processor.

    A sample whose text speaks of a mark that the tokenizer has a token for has the run's own ids: the stock processor would take
    the mark for a picture.
    """
    processor, sample = dataset.processor, dataset.source[index]
    pictures = [picture.load() for picture in dataset.pictures(index)]
    spoken = {mark for mark in _MARKS if any(mark in text for text in _texts(sample))}
    text, spans = _with_answers(dataset, sample)
    if spoken & set(processor.tokenizer.get_added_vocab()):
        ids, labels = dataset.text(index)
        return (
            ids,
            labels,
            _media(processor(text=[processor.image_token * len(pictures)], images=[pictures], return_tensors="pt")),
        )
    bos = processor.tokenizer.bos_token
    special = bos is None or not text.startswith(bos)
    made = processor(text=[text], images=[pictures] if pictures else None, add_special_tokens=special, return_tensors="pt")
    whole = made["input_ids"][0]
    labels = torch.full_like(whole, IGNORE)
    for first, last in spans:
        # As many tokens as the text before has, with its pictures: what ends there is the same on its own.
        until_first, until_last = (_count(processor, text[:end], pictures, special) for end in (first, last))
        labels[until_first:until_last] = whole[until_first:until_last]
    most = dataset.limits.max_length
    return whole[:most], labels[:most], _media(made)


def _with_answers(dataset: ProcessedDataset, sample: RawSample) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the template writes it, with an end behind every answer, and the answers that are targets."""
    answers, processor = dataset.answers, dataset.processor
    messages = [_without_reasoning(message) if answers.reasoning == "drop" else dict(message) for message in sample.messages]
    asked = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = {
        "all": {number for number in asked if sample.flags.get(number) is not False},
        "last": {number for number in asked[-1:] if sample.flags.get(number) is not False},
        "flagged": {number for number in asked if sample.flags.get(number) is True},
    }[answers.train_on]

    def render(count: int, prompt: bool) -> str:
        options = {"tools": list(sample.tools)} if sample.tools else {}
        return str(
            processor.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt, **options)
            if count
            else ""
        )

    text = render(len(messages), False)
    inserted, spans = 0, []
    for number in asked:
        before = render(number, True) if number else ""
        if not text.startswith(before, 0):  # a prompt that opens a reasoning block, which earlier answers have not
            before = before.partition("<think>")[0]
        start = len(before)
        said = "".join(part["text"] for part in messages[number]["content"] if part["type"] == "text").rpartition("</think>")[2]
        place = text.find(said.strip(), start)
        until = len(render(number + 1, False)) if text.startswith(render(number + 1, False)) else len(text)
        ends = [at + len(end) for end in answers.ends if 0 <= (at := text.find(end, start)) < max(until, place + len(said) + 20)]
        if answers.reasoning == "drop" and "</think>" in text[start:place]:
            start = place
        spans.append((number, start, min(ends, default=None), place, said))
    found = []
    for number, start, end, place, said in spans:
        start += inserted
        if end is None:
            stop = place + inserted + (len(said) if text.startswith(said, place + inserted) else len(said.strip()))
            eos = processor.tokenizer.eos_token
            text, inserted = text[:stop] + eos + text[stop:], inserted + len(eos)
            end = stop + len(eos)
        else:
            end += inserted
        if number in wanted:
            found.append((start, end))
    return text, found


def _without_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    parts = [
        part if part["type"] != "text" else {**part, "text": re.sub(r"(?s)\s*<think>.*?</think>\s*", "", part["text"])}
        for part in message["content"]
    ]
    return {key: value for key, value in message.items() if key != "reasoning_content"} | {"content": parts}


def _texts(sample: RawSample) -> list[str]:
    return [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]


def _count(processor: Any, text: str, pictures: Sequence[Any], special: bool) -> int:
    its = list(pictures[: text.count(processor.image_token)])
    made = processor(text=[text], images=[its] if its else None, add_special_tokens=special, return_tensors="pt")
    return len(made["input_ids"][0])


def _media(made: Mapping[str, Any]) -> dict[str, Tensor]:
    names = ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids")
    return {name: made[name] for name in names if name in made}
