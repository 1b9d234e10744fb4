"""A config that cannot be read, or of which no model can be built, gets one message that names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import qwen3_vl, write_model_folder

from meshweave.errors import CheckpointError, ConfigError
from meshweave.model.blueprint import blueprint_of, read_model_config

Tree = dict[str, Any]


def text(**changes: Any) -> Callable[[Tree], Tree]:
    return lambda tree: tree | {"text_config": tree["text_config"] | changes}


@pytest.mark.parametrize(
    "change",
    [
        lambda _: [],
        lambda tree: {key: value for key, value in tree.items() if key != "model_type"},
        lambda tree: tree | {"model_type": "no_such_model"},
        lambda tree: tree | {"text_config": [1]},
        lambda tree: tree | {"dtype": "float7"},
        text(hidden_size="wide"),
        text(hidden_size=32.5),
        lambda _: {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}},
    ],
)
def test_a_config_that_transformers_cannot_read_is_refused(
    change: Callable[[Tree], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether code may run"))
    file = write_model_folder(qwen3_vl(), tmp_path) / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match=r"config\.json is not a config this transformers can read \(.*\); copy it"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("change", [text(hidden_act="no_such_function"), text(num_attention_heads=0)])
def test_a_config_of_which_no_model_can_be_built_is_refused(change: Callable[[Tree], Tree], tmp_path: Path) -> None:
    file = write_model_folder(qwen3_vl(), tmp_path) / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ConfigError, match=r"config\.json: transformers cannot build its qwen3_vl model \(.*\); compare it"):
        blueprint_of(read_model_config(tmp_path), torch.float32)
