"""Do synthetic samples fit the models they are made for, in every ragged shape?"""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

from meshweave.data.join import join_media
from meshweave.data.synthetic import SyntheticDataset
from meshweave.errors import ConfigError

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llava(vision=None, strategy: str = "default") -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision or CLIPVisionConfig(**SIZES, image_size=16, patch_size=4),
        text_config=LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64, pad_token_id=3),
        image_token_index=60,
        vision_feature_select_strategy=strategy,
    )


def siglip() -> LlavaConfig:
    return llava(SiglipVisionConfig(**SIZES, image_size=12, patch_size=4), "full")


def qwen() -> Qwen3VLConfig:
    text = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16}
    sizes = {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision | sizes,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )


CONFIGS = {
    "clip": llava,
    "clip with class token": lambda: llava(strategy="full"),
    "siglip": siglip,
    "qwen": qwen,
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]()


def test_samples_are_ragged_from_the_first_four_on(config):
    dataset = SyntheticDataset(config, 40)
    metas = [dataset.meta(index) for index in range(40)]
    assert [len(meta.media) for meta in metas[:2]] == [1, 0]
    assert len(metas[3].media) == 7
    assert len({len(meta.media) for meta in metas[2::4]}) > 3
    assert len({meta.tokens for meta in metas}) > 10
    if config.model_type == "qwen3_vl":
        assert len({item.tokens for item in metas[3].media}) > 1


def test_metadata_text_and_media_agree(config):
    dataset = SyntheticDataset(config, 12)
    for index in range(12):
        meta, (input_ids, labels) = dataset.meta(index), dataset.text(index)
        assert meta.sample == index
        assert meta.tokens == len(input_ids) == len(labels)
        placeholders = {"image": config.image_token_id, "video": getattr(config, "video_token_id", None)}
        for kind, token in placeholders.items():
            runs = [run for item in meta.media if item.kind == kind for run in item.runs]
            places = [place for first, count in runs for place in range(first, first + count)]
            assert places == [place for place, id_ in enumerate(input_ids.tolist()) if id_ == token]
        for item in meta.media:
            assert sum(count for _, count in item.runs) == item.tokens
        targets = labels[labels != -100]
        assert len(targets) >= 2
        assert torch.equal(targets, input_ids[-len(targets) :])
        for slot, item in enumerate(meta.media):
            assert item.module == "vision"
            inputs = dataset.media(index, slot)
            if item.grid is not None:
                assert inputs["image_grid_thw"].tolist() == [list(item.grid)]
                assert len(inputs["pixel_values"]) == item.cost


def test_text_ids_have_no_special_meaning():
    dataset = SyntheticDataset(qwen(), 4, text_tokens=(400, 500))
    ids = torch.cat([dataset.text(index)[0] for index in range(4)])
    assert set(ids.tolist()) - {60, 61, 62, 63} <= set(range(60))
    plain = torch.cat([SyntheticDataset(llava(), 4, text_tokens=(400, 500)).text(i)[0] for i in range(4)])
    assert not (plain == 3).any()  # the padding token's embedding has no gradient


def test_the_model_accepts_every_kind_of_sample(config):
    torch.manual_seed(0)
    build = Qwen3VLForConditionalGeneration if config.model_type == "qwen3_vl" else LlavaForConditionalGeneration
    model = build(config)
    dataset = SyntheticDataset(config, 4, most_items=3)
    for index in range(4):
        input_ids, labels = dataset.text(index)
        items = [dataset.media(index, slot) for slot in range(len(dataset.meta(index).media))]
        kinds = [item.kind for item in dataset.meta(index).media]
        media = {}
        for kind, suffix in (("image", ""), ("video", "_videos")):
            found = join_media([item for item, its in zip(items, kinds, strict=True) if its == kind])
            media |= {f"{key}{suffix}".replace("image_grid_thw_videos", "video_grid_thw"): value for key, value in found.items()}
        types = (
            {"mm_token_type_ids": ((input_ids == 60) + 2 * (input_ids == 61))[None]} if config.model_type == "qwen3_vl" else {}
        )
        output = model(input_ids=input_ids[None], labels=labels[None], **media, **types)
        assert output.loss.isfinite()
    encoded = model.model.get_image_features(**dataset.dummy_media("vision"))
    assert len(encoded.pooler_output) == 1


def test_samples_follow_from_seed_and_index_alone(config):
    first, again, other = (SyntheticDataset(config, 8, seed=seed) for seed in (1, 1, 2))
    again.media(7, 3)  # what was asked before must not matter
    assert first.meta(3) == again.meta(3)
    assert torch.equal(first.text(3)[0], again.text(3)[0])
    assert torch.equal(first.media(3, 2)["pixel_values"], again.media(3, 2)["pixel_values"])
    assert not torch.equal(first.media(3, 2)["pixel_values"], first.media(3, 3)["pixel_values"])
    assert first.text(3)[0].tolist() != other.text(3)[0].tolist()


def test_a_dummy_item_looks_like_a_real_one_and_is_blank(config):
    dataset = SyntheticDataset(config, 4)
    real, dummy = dataset.media(0, 0), dataset.dummy_media("vision")
    assert dataset.dummy_meta("vision").tokens > 0
    if "image_grid_thw" in dummy:
        assert [list(dataset.dummy_meta("vision").grid)] == dummy["image_grid_thw"].tolist()
    assert {key: (v.dtype, v.shape[1:]) for key, v in dummy.items()} == {key: (v.dtype, v.shape[1:]) for key, v in real.items()}
    assert not dummy["pixel_values"].any()


def test_a_model_without_a_known_vision_tower_is_refused():
    with pytest.raises(ConfigError, match="model 'llama': no `vision_config`"):
        SyntheticDataset(LlamaConfig(), 4)
