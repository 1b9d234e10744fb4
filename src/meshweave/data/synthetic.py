"""What does a model of a given configuration take? Random ragged samples, for tests and `verify`."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meshweave.batch.plan import MediaMeta, SampleMeta
from meshweave.data.dataset import IGNORE, with_runs
from meshweave.data.synthetic_media import Item, media_of


class SyntheticDataset:
    """A `Dataset` of random tokens and media that fit the Hugging Face model configuration `hf_config`.

    Samples go round in fours: one media item, none, a few, `most_items`; of whatever kinds the model takes, in turn or at random.
    Texts of `text_tokens` = (fewest, most) tokens with ordinary ids stand before and after every item; the last text is the
    target. Media have the shapes that the model's processor would give them (`synthetic_media`), with 1 to `most_side` media
    tokens a side where they may. Everything follows from `seed` and index.

    Raises `ConfigError` if the configuration takes no media that samples can be made for.
    """

    def __init__(
        self,
        hf_config: Any,
        samples: int,
        seed: int = 0,
        *,
        text_tokens: tuple[int, int] = (2, 12),
        most_items: int = 7,
        most_side: int = 3,
    ) -> None:
        self.samples, self.seed = samples, seed
        self.text_tokens, self.most_items = text_tokens, most_items
        self._ordinary_ids = _ordinary_ids(hf_config)
        self._media = media_of(hf_config, most_side, self._ordinary_ids)
        keys = {"image": "image_token_id", "video": "video_token_id", "audio": "audio_token_id"}
        self._placeholders = {kind: id_ for kind, key in keys.items() if (id_ := getattr(hf_config, key, None)) is not None}
        self._sample = lru_cache(maxsize=256)(self._draw)

    def __len__(self) -> int:
        return self.samples

    def meta(self, index: int) -> SampleMeta:
        """Token counts, grids and runs; the cost of an item is its number of patches or frames."""
        items, ids = self._sample(index)[1], self._ids(index)
        return SampleMeta(index, len(ids), with_runs([item.meta for item in items], ids, self._placeholders))

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """`input_ids` and `labels` [tokens] int64; the last text is the target."""
        texts, _ = self._sample(index)
        input_ids = torch.tensor(self._ids(index), dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORE)
        labels[-texts[-1] :] = input_ids[-texts[-1] :]
        return input_ids, labels

    def media(self, index: int, slot: int) -> dict[str, Tensor]:
        """Normally distributed pixels or spectrograms of one item, float32."""
        random = self._random(index, 2 + slot)
        item = self._sample(index)[1][slot]
        return item.inputs(lambda shape: torch.from_numpy(random.standard_normal(shape, dtype=np.float32)))

    def dummy_media(self, module: str) -> dict[str, Tensor]:
        """One blank item, the same for every sample."""
        return self._blank(module).inputs(torch.zeros)

    def dummy_meta(self, module: str) -> MediaMeta:
        """Tokens and grid of `dummy_media`."""
        return replace(self._blank(module).meta, cost=0.0)

    def _blank(self, module: str) -> Item:
        return next(kind for kind in self._media if kind.module == module).draw(np.random.default_rng(0))

    def _random(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index, stream])

    def _ids(self, index: int) -> list[int]:
        texts, items = self._sample(index)
        random = self._random(index, 1)
        first, *others = (random.choice(self._ordinary_ids, count).tolist() for count in texts)
        return [*first, *(token for item, text in zip(items, others, strict=True) for token in (*item.ids, *text))]

    def _draw(self, index: int) -> tuple[list[int], list[Item]]:
        """The lengths of the texts, and the items between them."""
        random = self._random(index, 0)
        fewest, most = self.text_tokens
        count = (1, 0, int(random.integers(1, self.most_items + 1)), self.most_items)[index % 4]
        chosen = [index // 4 % len(self._media)] if count == 1 else random.integers(len(self._media), size=count).tolist()
        return (
            [int(random.integers(fewest, most + 1)) for _ in range(count + 1)],
            [self._media[kind].draw(random) for kind in chosen],
        )


def _ordinary_ids(hf_config: Any) -> np.ndarray:
    """Every id of the vocabulary but those with a role (media placeholders, padding, start and end)."""
    text = hf_config.get_text_config()
    special = {
        value
        for config in (hf_config, text)
        for name in dir(config)
        if name.endswith(("_token_id", "_token_index")) and isinstance(value := getattr(config, name, None), int)
    }
    return np.setdiff1d(np.arange(text.vocab_size), list(special))
