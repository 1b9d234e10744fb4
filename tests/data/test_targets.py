"""Targets are what the model would have to write by itself: everything behind the generation prompt, the end of turn, no more."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from support.folders import byte_tokenizer, model_folder
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from meshweave.data.dataset import IGNORE, RawSample
from meshweave.data.processed import ProcessedDataset
from meshweave.data.processor import load_processor
from meshweave.data.targets import Answers
from meshweave.errors import ConfigError, DataError, LeftOutError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINK = (  # as Qwen3's: an empty block behind the last question alone, and of earlier answers no reasoning
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set text = m.content[0].text if m.content else '' %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is defined %}{%- set thought = m.reasoning_content %}{%- elif '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED = THINK.replace("'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}")
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' }}"
    "{{ m.content[0].text | trim }}{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m.role | upper + ': ' if m.role != 'system' }}{{ m.content[0].text + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content[0].text + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content[0].text + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_SHORT = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")
TOOLS = "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}" + CHATML.replace(
    "{{ '<|im_end|>\n' }}", "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
)
SPECIAL = ("<image>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<|video_pad|>")


def processor(template: str, eos: str = "<|im_end|>") -> LlavaProcessor:
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = byte_tokenizer(eos, *SPECIAL)
    return LlavaProcessor(images, tokens, patch_size=8, chat_template=template, vision_feature_select_strategy="full")


def talk(*turns: Any) -> RawSample:
    """`("user", "What?")` or a message."""
    messages = [
        turn if isinstance(turn, dict) else {"role": turn[0], "content": [{"type": "text", "text": turn[1]}]} for turn in turns
    ]
    return RawSample(messages)


def targets(template: str, sample: RawSample, eos: str = "<|im_end|>", **choices: Any) -> tuple[str, list[str]]:
    """The whole text, and the text of every run of target tokens."""
    its = processor(template, eos)
    dataset = ProcessedDataset([sample], its, Answers.of(its, **choices))
    ids, labels = dataset.text(0)
    runs: list[list[int]] = [[]]
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if label == IGNORE:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return its.tokenizer.decode(ids), [its.tokenizer.decode(run) for run in runs if run]


TWO = talk(("user", "What?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", "Yes."))
EMPTY_BLOCK = "<think>\n\n</think>\n\n"

CASES: dict[str, tuple[str, RawSample, list[str], dict[str, Any]]] = {
    "chatml: the end of turn, not the line break": (CHATML, TWO, ["A cat.<|im_end|>", "Yes.<|im_end|>"], {}),
    "the last answer alone": (CHATML, TWO, ["Yes.<|im_end|>"], {"train_on": "last"}),
    "think: a block before the last answer": (THINK, TWO, ["A cat.<|im_end|>", f"{EMPTY_BLOCK}Yes.<|im_end|>"], {}),
    "think: the empty block dropped": (THINK, TWO, ["A cat.<|im_end|>", "Yes.<|im_end|>"], {"reasoning": "drop"}),
    "think: an answer begins": (
        THINK,
        talk(("assistant", "Hello."), ("user", "What?"), ("assistant", "A cat.")),
        ["Hello.<|im_end|>", f"{EMPTY_BLOCK}A cat.<|im_end|>"],
        {},
    ),
    "think: reasoning in the text": (
        THINK,
        talk(("user", "What?"), ("assistant", "<think>\nFur.\n</think>\n\nA cat.")),
        ["<think>\nFur.\n</think>\n\nA cat.<|im_end|>"],
        {},
    ),
    "think: reasoning beside the text": (
        THINK,
        talk(("user", "?"), {"role": "assistant", "content": [{"type": "text", "text": "A cat."}], "reasoning_content": "Fur."}),
        ["<think>\nFur.\n</think>\n\nA cat.<|im_end|>"],
        {},
    ),
    "think: reasoning taken out": (
        THINK,
        talk(("user", "What?"), ("assistant", "<think>\nFur.\n</think>\n\nA cat.")),
        ["A cat.<|im_end|>"],
        {"reasoning": "drop"},
    ),
    "think: a prompt that opens the block": (OPENED, TWO, ["A cat.<|im_end|>", "\n</think>\n\nYes.<|im_end|>"], {}),
    "llama: trimmed turns": (
        LLAMA,
        talk(("user", " What?\n"), ("assistant", "  A cat. \n")),
        ["A cat.<|eot|>"],
        {},
    ),
    "vicuna writes no end: the tokenizer's is put there": (VICUNA, TWO, [" A cat.</s>", " Yes.</s>"], {"eos": "</s>"}),
    "an answer that repeats the question": (
        VICUNA,
        talk(("user", "ASSISTANT: x"), ("assistant", "USER: ASSISTANT: x"), ("user", "x"), ("assistant", "x")),
        [" USER: ASSISTANT: x</s>", " x</s>"],
        {"eos": "</s>"},
    ),
    "no generation prompt, reasoning in the text": (
        "{% for m in messages %}{{ '<|start|>' + m.content[0].text }}"
        "{{ '<|im_end|>' if m.role == 'assistant' else '<|end|>' }}{% endfor %}",
        talk(("user", "What?"), ("assistant", "<think>\nFur.\n</think>\n\nA cat.")),
        ["<think>\nFur.\n</think>\n\nA cat.<|im_end|>"],
        {},
    ),
    "consecutive answers": (
        CHATML,
        talk(("user", "?"), ("assistant", "A"), ("assistant", "A")),
        ["A<|im_end|>", "A<|im_end|>"],
        {},
    ),
    "an empty answer ends": (CHATML, talk(("user", "?"), ("assistant", "")), ["<|im_end|>"], {}),
    "unicode and white space are kept": (
        CHATML,
        talk(("user", "?"), ("assistant", "  é 猫\n\n🙂 ")),
        ["  é 猫\n\n🙂 <|im_end|>"],
        {},
    ),
    "generation marks": (MARKED, TWO, ["A cat.<|im_end|>", "Yes.<|im_end|>"], {}),
    "generation marks without the end of turn": (MARKED_SHORT, TWO, ["A cat.<|im_end|>", "Yes.<|im_end|>"], {}),
    "generation marks, and no end of turn anywhere": (
        MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}"),
        TWO,
        ["A cat.<|im_end|>", "Yes.<|im_end|>"],
        {},
    ),
    "generation marks, last": (MARKED, TWO, ["Yes.<|im_end|>"], {"train_on": "last"}),
    "an answer that speaks of marks": (
        CHATML,
        talk(("user", "Which <image> tag?"), ("assistant", "Write <image> or <video>.")),
        ["Write <image> or <video>.<|im_end|>"],
        {},
    ),
}


@pytest.mark.parametrize(("template", "sample", "expected", "options"), CASES.values(), ids=CASES)
def test_what_is_learned(template: str, sample: RawSample, expected: list[str], options: dict[str, Any]) -> None:
    _, found = targets(template, sample, **options)
    assert found == expected


CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}


def test_calls_of_tools_are_answers_and_results_are_not() -> None:
    call = {"role": "assistant", "content": [], "tool_calls": [CALL]}
    sample = talk(("user", "What?"), call, ("tool", "blue"), ("assistant", "The sky."))
    text, found = targets(TOOLS, RawSample(sample.messages, tools=[{"name": "look"}]))
    assert 'Tools: [{"name": "look"}]' in text
    assert found == ['{"name": "look", "arguments": {}}<|im_end|>', "The sky.<|im_end|>"]
    with pytest.raises(DataError, match="describes tools, but the chat template writes none") as caught:
        targets(CHATML, RawSample(TWO.messages, tools=[{"name": "look"}]))
    assert caught.value.kind == "chat template"


@pytest.mark.parametrize(
    ("train_on", "flags", "expected"),
    [
        ("all", {1: False}, ["Yes.<|im_end|>"]),
        ("flagged", {1: True}, ["A cat.<|im_end|>"]),
        ("flagged", {1: True, 3: True}, ["A cat.<|im_end|>", "Yes.<|im_end|>"]),
    ],
)
def test_flags_of_a_record_are_heeded(train_on: str, flags: dict[int, bool], expected: list[str]) -> None:
    assert targets(CHATML, RawSample(TWO.messages, flags=flags), train_on=train_on)[1] == expected


@pytest.mark.parametrize(
    ("sample", "options"),
    [
        (talk(("user", "What?")), {}),
        (TWO, {"train_on": "flagged"}),
        (RawSample(TWO.messages, flags={3: False}), {"train_on": "last"}),
        (RawSample(TWO.messages, flags={1: False, 3: False}), {}),
    ],
)
def test_a_sample_without_targets_is_left_out_by_name(sample: RawSample, options: dict[str, Any]) -> None:
    with pytest.raises(LeftOutError, match=r"it has no answer.*nothing to learn") as caught:
        targets(CHATML, sample, **options)
    assert caught.value.kind == "no target"


def test_marks_of_the_template_agree_with_transformers_token_by_token() -> None:
    its = processor(MARKED)
    dataset = ProcessedDataset([TWO], its, Answers.of(its))
    stock = its.tokenizer.apply_chat_template(
        list(TWO.messages), chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, labels = dataset.text(0)
    assert ids.tolist() == stock["input_ids"]
    assert (labels != IGNORE).int().tolist() == stock["assistant_masks"]


def published_llava_targets(tokenizer: Any, sample: RawSample) -> list[list[int]]:
    """LLaVA's own v1 recipe, in our words: rounds end in `</s>`, and of each what follows `ASSISTANT:` is a target."""
    said = [part["text"] for message in sample.messages for part in message["content"]]
    return [tokenizer(f" {answer}</s>", add_special_tokens=False)["input_ids"] for answer in said[1::2]]


def test_targets_of_llava_are_those_of_its_own_training(tmp_path: Path) -> None:
    its = load_processor(model_folder("llava", tmp_path))
    dataset = ProcessedDataset([TWO], its, Answers.of(its, tmp_path))
    ids, labels = (each.tolist() for each in dataset.text(0))
    runs = [list(run) for target, run in groupby(labels, lambda label: label != IGNORE) if target]
    assert runs == published_llava_targets(its.tokenizer, TWO)
    assert its.tokenizer.decode(ids) == "USER: What? ASSISTANT: A cat.</s> USER: Sure? ASSISTANT: Yes.</s> "
    assert dataset.answers.notice() == "the chat template writes no end of an answer: </s> is put behind each, as a target"


def test_targets_of_qwen_vl_are_those_of_its_own_training(tmp_path: Path) -> None:
    """Its recipe: of an assistant's turn everything behind `<|im_start|>assistant` and the line break, `<|im_end|>` included."""
    its = load_processor(model_folder("qwen3_vl", tmp_path))
    dataset = ProcessedDataset([TWO], its, Answers.of(its, tmp_path))
    ids, labels = (each.tolist() for each in dataset.text(0))
    text = its.tokenizer.decode(ids)
    learned = its.tokenizer.decode([label for label in labels if label != IGNORE])
    assert learned == "".join(turn.split("<|im_end|>")[0] + "<|im_end|>" for turn in text.split("<|im_start|>assistant\n")[1:])
    assert dataset.answers.notice() is None


def test_other_end_tokens_of_the_generation_config_end_an_answer(tmp_path: Path) -> None:
    folder = model_folder("qwen3_vl", tmp_path)
    its = load_processor(folder)
    its.chat_template = CHATML.replace("<|im_end|>\n", "<|vision_end|>\n")
    end = its.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, its.tokenizer.eos_token_id]}))
    assert "<|vision_end|>" in Answers.of(its, folder).ends


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("x <|im_end|> y", r"turn 1: the text holds '<\|im_end\|>', a special token"),
        ("<|video_pad|>", r"turn 1: the text holds '<\|video_pad\|>'"),
        ("a \ue000 b", r"turn 1: a text holds a private character"),
    ],
)
def test_a_special_token_that_somebody_typed_leaves_its_sample_out_by_name(said: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        targets(CHATML, talk(("user", "?"), ("assistant", said)))
    assert caught.value.kind == "special token"


def test_a_special_token_in_a_call_or_a_tool_leaves_its_sample_out_by_name() -> None:
    call = {"role": "assistant", "content": [], "tool_calls": [{"function": {"name": "look", "arguments": {"at": "<|im_end|>"}}}]}
    with pytest.raises(DataError, match=r"turn 1: a call holds '<\|im_end\|>'"):
        targets(TOOLS, talk(("user", "?"), call))
    with pytest.raises(DataError, match=r"the description of tools holds '<\|im_end\|>'"):
        targets(TOOLS, RawSample(TWO.messages, tools=[{"name": "<|im_end|>"}]))


def test_a_generation_config_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read generation_config\.json"):
        Answers.of(processor(CHATML), tmp_path)


def test_the_missing_end_of_turn_is_said_whatever_is_trained_on() -> None:
    its = processor(VICUNA, "</s>")
    assert all(Answers.of(its, train_on=which).notice() for which in ("all", "last", "flagged"))


def test_a_mark_that_is_spoken_of_is_no_placeholder() -> None:
    its = processor(CHATML)
    ids, _ = ProcessedDataset([talk(("user", "?"), ("assistant", "<image>"))], its).text(0)
    assert its.tokenizer.convert_tokens_to_ids("<image>") not in ids.tolist()
    assert "<image>" in its.tokenizer.decode(ids)


def test_ids_beyond_the_embedding_are_refused_with_their_token() -> None:
    its = processor(CHATML)
    dataset = ProcessedDataset([TWO], its, vocabulary=its.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    with pytest.raises(DataError, match=r"the token '<\|im_(end|start)\|>' of id \d+, but the model's embedding has \d+ rows"):
        dataset.meta(0)


def test_reasoning_that_a_template_leaves_out_is_counted() -> None:
    its = processor(THINK)
    thought = talk(("user", "?"), ("assistant", "<think>\nFur.\n</think>\n\nA cat."), ("user", "?"), ("assistant", "Yes."))
    assert ProcessedDataset([thought], its).effects(0) == ("reasoning that the chat template leaves out",)
    assert ProcessedDataset([TWO], its).effects(0) == ()


SHORTENED = "{% for m in messages %}{{ m.content[0].text[:3] }}{% endfor %}"
REVERSED = "{% for m in messages %}{{ m.content[0].text | reverse }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "sample", "message"),
    [
        (SHORTENED, TWO, "changes what turns say, so the answers cannot be located"),
        (REVERSED, TWO, "changes what turns say, so the answers cannot be located"),
        ("{{ raise_exception('roles must alternate') }}", TWO, "refuses the turns .*roles must alternate"),
        ("{{ messages[0].nothing.more }}", TWO, "refuses the turns"),
        (MARKED.replace("m.role == 'assistant'", "loop.last"), TWO, "marks hold 1 texts for 2 answers"),
    ],
)
def test_a_template_that_hides_answers_leaves_samples_out_by_name(template: str, sample: RawSample, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        targets(template, sample)
    assert caught.value.kind == "chat template"
