"""Which part of a conversation does a model have to say? Its answers, located in what the chat template writes.

Targets of an answer are the tokens of everything that follows the generation prompt, up to and including the token that ends
generation: what the model would have to write by itself, and no more. In detail:

- The generation prompt (`<|im_start|>assistant`, `ASSISTANT:`) is no target; what the template writes behind it, a reasoning
  block for one, is. With `data.reasoning: drop` it is not, and what a record has of reasoning is taken out.
- The end of an answer is the first end token behind it: the tokenizer's, one of generation_config.json, or the special token that
  the template writes behind a last answer. White space behind it is no target.
- Where the template writes no end token (LLaVA-1.5's), the tokenizer's is put behind every answer and is a target, as in LLaVA's
  own training. One line says so.
- Templates with `{% generation %}` marks say themselves what is a target; the end token of an answer is one in any case.
- Which answers: all, the last, or those that the record flags (`data.train_on`). A flag that says no is heeded under `all`, too.
- A token is a target if any character of it is, as in transformers' assistant masks.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from transformers.utils.chat_template_utils import render_jinja_template

from meshweave.data.dataset import RawSample
from meshweave.data.processor import read_json
from meshweave.errors import DataError, LeftOutError

THINKING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
LITERALS = {"\ue100": "<image>", "\ue101": "<video>", "\ue102": "<audio>"}
"""Private characters that stand for marks which are spoken of, while templates are rendered that write such marks themselves."""
_OPEN, _CLOSE = "\ue000", "\ue001"
_PRIVATE = re.compile("[\ue000-\ue001\ue100-\ue102]")
_NOT_THERE = "so the answers cannot be located; split the conversation, or mark them with {% generation %} in the template"

_STRIPPED: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
"""What templates may do to a text."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """A conversation as the template writes it."""

    text: str
    """With `LITERALS` in place of the marks that are spoken of, and one image token for every picture."""
    targets: tuple[Span, ...]
    """Characters that are targets, ascending."""
    effects: tuple[str, ...] = ()
    """What was changed on the way, for counts."""


@dataclass(frozen=True)
class Answers:
    """How the answers of a model's conversations are found.

    `processor` has the template and the tokenizer; `special` finds what no text may hold; `ends` are texts of tokens that end
    generation.
    """

    processor: Any
    special: re.Pattern[str]
    ends: frozenset[str]
    train_on: Literal["all", "last", "flagged"] = "all"
    reasoning: Literal["keep", "drop"] = "keep"

    @classmethod
    def of(cls, processor: Any, folder: Path | None = None, **choices: Any) -> "Answers":
        """With the end tokens of the tokenizer and of a folder's generation_config.json. Raises ConfigError if that is broken."""
        tokenizer = processor.tokenizer
        listed: list[Any] = [tokenizer.eos_token_id]
        if folder is not None:
            found = read_json(folder / "generation_config.json").get("eos_token_id")
            listed += found if isinstance(found, list) else [found]
        ends = {tokenizer.convert_ids_to_tokens(id_) for id_ in listed if isinstance(id_, int)}
        return cls(processor, _special_tokens(processor), frozenset(end for end in ends if end), **choices)

    def conversation(self, sample: RawSample) -> Conversation:
        """What the template writes of a sample, and what of it are targets.

        Raises:
            DataError: a special token in a text; the template refuses the turns, or writes them so that answers cannot be found.
            LeftOutError: nothing is a target.
        """
        messages = [self._prepared(number, message) for number, message in enumerate(sample.messages)]
        asked = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        trained = self._trained(asked, sample.flags)
        if not trained:
            which = "no answer" if not asked else f"no answer that data.train_on={self.train_on} and its flags make a target"
            raise LeftOutError(f"it has {which}, so there is nothing to learn", "no target")
        tools = self._tools(sample)
        if "generation %}" in self.processor.chat_template or "generation -%}" in self.processor.chat_template:
            return self._marked(messages, asked, trained, tools)
        text = self._render(messages, tools)
        placed = self._placed(messages, text, tools)
        pieces, spans, at, length = [], [], 0, 0
        prompts = self._prompts(messages, asked[0], tools)
        ends = self.ends | self._end_of_last(text, placed, messages)
        for number in asked:
            before = placed[number - 1][1] if number else 0
            first, last = placed[number]
            until = placed[number + 1][0] if number + 1 < len(messages) else len(text)
            start = self._behind_prompt(text, before, first if first < last else until, prompts, number)
            if self.reasoning == "drop" and "</think>" in text[start:first]:
                start = first
            end = _first_end(text, max(last, start), until, ends)
            appended = ""
            if end is None:
                if first == last:
                    raise DataError(f"turn {number}: the chat template writes no end of a call, {_NOT_THERE}", "chat template")
                appended, end = self.processor.tokenizer.eos_token or "", last
            pieces.append(text[at:end] + appended)
            if number in trained:
                spans.append((length + start - at, length + end - at + len(appended)))
            length += len(pieces[-1])
            at = end
        effects = self._effects(sample, text)
        return Conversation("".join([*pieces, text[at:]]), tuple(spans), effects)

    def notice(self) -> str | None:
        """What a user should know of all conversations: one line, or None."""
        asked = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
        try:
            plain = self._render([asked, said], ())
            found = self.conversation(RawSample([asked, said], flags={1: True}))
        except DataError:
            return None
        if found.text == plain:
            return None
        return (
            f"the chat template writes no end of an answer: {self.processor.tokenizer.eos_token} is put behind each, as a target"
        )

    def _prepared(self, number: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message whose texts hold no special token, and private characters for the marks that they speak of."""
        dropped = self.reasoning == "drop" and message["role"] == "assistant"
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                text = THINKING.sub("", part["text"]) if dropped else part["text"]
                part = {"type": "text", "text": self._plain(number, text)}
            parts.append(part)
        self._refuse_special(f"turn {number}: a call", json.dumps(message.get("tool_calls") or [], ensure_ascii=False))
        prepared = {**message, "content": parts}
        if "reasoning_content" in prepared:
            reasoning = self._plain(number, str(prepared.pop("reasoning_content")))
            if not dropped:
                prepared["reasoning_content"] = reasoning
        return prepared

    def _plain(self, number: int, text: str) -> str:
        if _PRIVATE.search(text):
            raise DataError(f"turn {number}: a text holds a private character that is used here; take it out", "special token")
        for private, mark in LITERALS.items():
            text = text.replace(mark, private)
        self._refuse_special(f"turn {number}: the text", text)
        return text

    def _refuse_special(self, what: str, text: str) -> None:
        if found := self.special.search(text):
            raise DataError(
                f"{what} holds {found.group()!r}, a special token of the tokenizer; write it otherwise", "special token"
            )

    def _trained(self, asked: Sequence[int], flags: Mapping[int, bool]) -> set[int]:
        match self.train_on:
            case "flagged":
                return {number for number in asked if flags.get(number, False)}
            case "last":
                return {number for number in asked[-1:] if flags.get(number, True)}
        return {number for number in asked if flags.get(number, True)}

    def _tools(self, sample: RawSample) -> Sequence[Any]:
        if sample.tools and "tools" not in self.processor.chat_template:
            raise DataError("the record describes tools, but the chat template writes none; take them out", "chat template")
        self._refuse_special("the description of tools", json.dumps(list(sample.tools), ensure_ascii=False))
        return sample.tools

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], prompt: bool = False) -> str:
        """What the template writes."""
        if not messages and not prompt:  # what comes before the first turn; not every template accepts an empty list
            return ""
        return self._rendered(messages, tools, add_generation_prompt=prompt)[0]

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], **options: bool) -> tuple[str, list[Span]]:
        """What the template writes, and what of it stands between generation marks."""
        conversation: Any = list(messages)
        given: dict[str, Any] = {**options, **self.processor.tokenizer.special_tokens_map}
        found: Any
        try:
            found = render_jinja_template(
                [conversation],
                tools=list(tools) or None,
                chat_template=self.processor.chat_template,
                **given,
            )
        except Exception as error:  # e.g. roles that do not alternate; templates run code, so anything may be raised
            roles = [message["role"] for message in messages]
            raise DataError(f"the chat template refuses the turns {roles}: {error}", "chat template") from error
        (text,), marked = found
        return text, marked[0] if marked else []

    def _placed(self, messages: Sequence[Mapping[str, Any]], text: str, tools: Sequence[Any]) -> list[Span]:
        """Where what each turn says lies in the text; for a turn that says nothing, an empty span between its neighbours."""
        for stripped, behind in product(_STRIPPED, (False, True)):
            marked = self._render([_between(message, stripped, behind) for message in messages], tools)
            opens, closes = ([match.start() for match in re.finditer(mark, marked)] for mark in (_OPEN, _CLOSE))
            said = [number for number, message in enumerate(messages) if _says(message)]
            same = marked.replace(_OPEN, "").replace(_CLOSE, "") == text
            ascending = all(first < last for first, last in zip(opens, closes, strict=False))
            if same and ascending and len(opens) == len(closes) == len(said):
                # Before the n-th pair of marks there are 2n of them.
                pairs = {number: (opens[n] - 2 * n, closes[n] - 2 * n - 1) for n, number in enumerate(said)}
                return _filled(pairs, len(messages))
        raise DataError(f"the chat template changes what turns say, {_NOT_THERE}", "chat template")

    def _prompts(self, messages: Sequence[Mapping[str, Any]], first: int, tools: Sequence[Any]) -> list[str]:
        """The generation prompt, and without a reasoning block that it begins: earlier answers may be written without."""
        before = messages[:first] or [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        closed, opened = self._render(before, tools), self._render(before, tools, prompt=True)
        prompt = opened.removeprefix(closed) if opened.startswith(closed) else ""
        found = [prompt, prompt.rstrip(), prompt.partition("<think>")[0], prompt.partition("<think>")[0].rstrip()]
        return [each for each in dict.fromkeys(found) if each]

    def _behind_prompt(self, text: str, before: int, first: int, prompts: Sequence[str], number: int) -> int:
        for prompt in prompts:
            if (place := text.rfind(prompt, before, first)) >= 0:
                return place + len(prompt)
        if not prompts:  # the template writes none: the answer follows what was asked
            return first
        raise DataError(
            f"turn {number}: the chat template does not write its generation prompt {prompts[0]!r} before it, {_NOT_THERE}",
            "chat template",
        )

    def _end_of_last(self, text: str, placed: Sequence[Span], messages: Sequence[Mapping[str, Any]]) -> frozenset[str]:
        """The special token right behind the last turn, if that is an answer: no further turn can have begun there."""
        if messages[-1]["role"] != "assistant":
            return frozenset()
        found = self.special.match(text[placed[-1][1] :].lstrip())
        return frozenset({found.group()}) if found else frozenset()

    def _marked(
        self, messages: Sequence[Mapping[str, Any]], asked: Sequence[int], trained: set[int], tools: Sequence[Any]
    ) -> Conversation:
        text, spans = self._rendered(messages, tools, return_assistant_tokens_mask=True)
        if len(spans) != len(asked):
            raise DataError(f"the template's generation marks hold {len(spans)} texts for {len(asked)} answers", "chat template")
        pieces, found, at, length = [], [], 0, 0
        for number, (first, last) in zip(asked, spans, strict=True):
            follows = next((end for end in self.ends if text.startswith(end, last)), "")
            ended = follows or text[first:last].rstrip().endswith(tuple(self.ends))
            appended = "" if ended else self.processor.tokenizer.eos_token or ""
            stop = last + len(follows)
            pieces.append(text[at:stop] + appended)
            if number in trained:
                found.append((length + first - at, length + stop - at + len(appended)))
            length += len(pieces[-1])
            at = stop
        return Conversation("".join([*pieces, text[at:]]), tuple(found))

    def _effects(self, sample: RawSample, text: str) -> tuple[str, ...]:
        if self.reasoning == "drop":
            return ()
        for message in sample.messages:
            reasoning = str(message.get("reasoning_content") or "")
            for part in message["content"] if message["role"] == "assistant" else ():
                if part["type"] == "text" and (found := re.search(r"<think>(.*?)</think>", part["text"], re.DOTALL)):
                    reasoning += found.group(1)
            if reasoning.strip() and reasoning.strip() not in text:
                return ("reasoning that the chat template leaves out",)
        return ()


def _special_tokens(processor: Any) -> re.Pattern[str]:
    """Of a processor's tokenizer, longest first: what no text may hold."""
    tokenizer = processor.tokenizer
    marks = {getattr(owner, name, None) for owner in (processor, tokenizer) for name in _MEDIA_TOKENS}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = {token for token in {*marks, *added, *tokenizer.all_special_tokens} if token}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


_MEDIA_TOKENS = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token")


def _says(message: Mapping[str, Any]) -> bool:
    return any(part["type"] == "text" and part["text"].strip() for part in message["content"])


def _between(message: Mapping[str, Any], stripped: Callable[[str], str], behind: bool) -> Mapping[str, Any]:
    """A message whose texts stand between private characters; `behind` its reasoning, which some templates take apart."""
    if not _says(message):
        return message
    parts = [dict(part) for part in message["content"]]
    texts = [part for part in parts if part["type"] == "text"]
    for part in texts:
        part["text"] = stripped(part["text"])
    said = [part for part in texts if part["text"].strip()]
    thought = re.match(r".*</think>\s*", said[0]["text"], re.DOTALL) if behind and message["role"] == "assistant" else None
    cut = thought.end() if thought else 0
    said[0]["text"] = said[0]["text"][:cut] + _OPEN + said[0]["text"][cut:]
    said[-1]["text"] += _CLOSE
    return {**message, "content": parts}


def _filled(pairs: Mapping[int, Span], turns: int) -> list[Span]:
    spans: list[Span] = []
    for number in range(turns):
        at = spans[-1][1] if spans else 0
        spans.append(pairs.get(number, (at, at)))
    return spans


def _first_end(text: str, first: int, last: int, ends: frozenset[str]) -> int | None:
    places = [(place, len(end)) for end in ends if (place := text.find(end, first, last)) >= 0]
    place, length = min(places, default=(-1, 0))
    return place + length if place >= 0 else None
