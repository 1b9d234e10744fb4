"""Model FLOPs are those that torch counts in a forward of the stock model."""

import pytest
import torch
from support.models import CONFIGS, EXPERT_CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from meshweave.config import LANGUAGE
from meshweave.data.synthetic import SyntheticDataset
from meshweave.model.flops import count_flops
from meshweave.model.modules import VISION, graph_of
from meshweave.verification.oracle import stock_batch


@pytest.mark.parametrize("family", ["llava", "llava_moe", "qwen3_vl"])
@pytest.mark.parametrize("index", [0, 1, 3])
def test_counted_flops_are_torchs(family: str, index: int) -> None:
    config = (CONFIGS | EXPERT_CONFIGS)[family]()
    if family.startswith("llava"):
        config.vision_feature_layer = -1
    # Eager attention and experts: their matrix products are visible to the counter.
    model = AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    dataset = SyntheticDataset(config, 8, most_items=3)
    meta = dataset.meta(index)
    inputs, _ = stock_batch(model, dataset, [index])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    graph = graph_of(model)
    expected = count_flops(graph, LANGUAGE).sample(meta.tokens)
    expected += sum(count_flops(graph, VISION).item(item) for item in meta.media)
    # What is left out: rotary angles, CLIP's class token.
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.06)
