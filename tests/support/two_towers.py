"""Which model has two encoders? A small one of images and sounds, as transformers writes such models, and samples of both."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedConfig,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from meshweave.batch.plan import MediaMeta, SampleMeta
from meshweave.data.dataset import with_runs
from support.models import llava


class TwoTowersConfig(LlavaConfig):
    model_type = "two_towers"
    sub_configs_defaults = LlavaConfig.sub_configs_defaults | {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model")
    }
    audio_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 6


class TwoTowersModel(LlavaModel):
    config: TwoTowersConfig

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__(config)
        self.audio_tower = AutoModel.from_config(config.audio_config)
        self.audio_projector = LlavaMultiModalProjector(config)
        self.post_init()

    def get_audio_features(self, input_features: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Spectrograms `[sounds, 1, frequencies, times]`; every patch yields a token, and so does the class token."""
        output = self.audio_tower(input_features, return_dict=True)
        output.pooler_output = list(self.audio_projector(output.last_hidden_state))
        return output

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        found = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            found["image"] = self.get_image_features(pixel_values, return_dict=True)
        if input_features is not None:
            found["audio"] = self.get_audio_features(input_features)
        embeddings = self.get_input_embeddings()(input_ids)
        for kind, token in (("image", self.config.image_token_id), ("audio", self.config.audio_token_id)):
            if kind in found:
                features = torch.cat(list(found[kind].pooler_output)).to(embeddings.dtype)
                mask = input_ids == token
                assert int(mask.sum()) == len(features), f"{len(features)} {kind} features for {int(mask.sum())} places"
                embeddings = embeddings.masked_scatter(mask.unsqueeze(-1), features)
        return self.language_model(inputs_embeds=embeddings, return_dict=True, **kwargs)


class TwoTowersForConditionalGeneration(LlavaForConditionalGeneration):
    config: TwoTowersConfig

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__(config)
        self.model = TwoTowersModel(config)
        self.post_init()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids, **kwargs)
        output.logits = self.lm_head(output.last_hidden_state)
        return output


AutoConfig.register("two_towers", TwoTowersConfig)
AutoModelForImageTextToText.register(TwoTowersConfig, TwoTowersForConditionalGeneration)


def two_towers() -> TwoTowersConfig:
    """LLaVA, and a tower of sounds beside it: 16 tokens an image, 5 a sound."""
    audio = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_channels=1,
        image_size=16,
        patch_size=8,
    )
    tree = llava().to_dict()
    return TwoTowersConfig(
        vision_config=tree["vision_config"], text_config=tree["text_config"], audio_config=audio, image_token_index=5
    )


class ImagesAndSounds:
    """A `Dataset` for `two_towers`: samples go round in five, an image, text alone, a sound, one of each, several of both."""

    def __init__(self, config: TwoTowersConfig, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        vision, audio = config.vision_config, config.audio_config
        self._shapes = {
            "vision": (1, 3, vision.image_size, vision.image_size),
            "audio": (1, 1, audio.image_size, audio.image_size),
        }
        self._keys = {"vision": "pixel_values", "audio": "input_features"}
        self._metas = {"vision": MediaMeta("vision", 16, cost=16.0), "audio": MediaMeta("audio", 5, cost=4.0, kind="audio")}
        self._tokens = {"vision": config.image_token_id, "audio": config.audio_token_id}

    def __len__(self) -> int:
        return self.samples

    def meta(self, index: int) -> SampleMeta:
        texts, kinds = self._shape(index)
        media = [self._metas[kind] for kind in kinds]
        placeholders = {"image": self._tokens["vision"], "audio": self._tokens["audio"]}
        placed = with_runs(media, self.text(index)[0].tolist(), placeholders)
        return SampleMeta(index, sum(texts) + sum(item.tokens for item in media), placed)

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """The text after the last medium is the target."""
        (first, *others), kinds = self._shape(index)
        random = self._random(index, 1)
        ids = random.integers(8, 96, first).tolist()
        for kind, length in zip(kinds, others, strict=True):
            ids += [self._tokens[kind]] * self._metas[kind].tokens + random.integers(8, 96, length).tolist()
        labels = [-100] * (len(ids) - [first, *others][-1]) + ids[-[first, *others][-1] :]
        return torch.tensor(ids), torch.tensor(labels)

    def media(self, index: int, slot: int) -> dict[str, Tensor]:
        kind = self._shape(index)[1][slot]
        values = self._random(index, 2 + slot).standard_normal(self._shapes[kind], dtype=np.float32)
        return {self._keys[kind]: torch.from_numpy(values)}

    def dummy_media(self, module: str) -> dict[str, Tensor]:
        return {self._keys[module]: torch.zeros(self._shapes[module])}

    def dummy_meta(self, module: str) -> MediaMeta:
        return self._metas[module]

    def _random(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index, stream])

    def _shape(self, index: int) -> tuple[list[int], list[str]]:
        """Lengths of the texts, and the encoders of the media between them."""
        random = self._random(index, 0)
        several = random.choice(["vision", "audio"], int(random.integers(2, 7))).tolist()
        kinds = (["vision"], [], ["audio"], ["audio", "vision"], several)[index % 5]
        return random.integers(2, 10, len(kinds) + 1).tolist(), kinds
