"""Every family trains, in every kind of layout that it is listed for, as one process trains it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import FAMILIES
from support.models import write_model_folder
from support.runs import module, verified

from families.cases import COLUMNS, FORMS, OPTIONS, REFUSED, cases
from families.table import DOCS, markdown, record
from meshweave.config import RunConfig, parse_config
from meshweave.data.synthetic import SyntheticDataset
from meshweave.errors import ConfigError, LayoutError
from meshweave.model.check import check_model
from meshweave.model.families import PROVEN
from meshweave.model.modules import ENCODERS, has_encoder
from meshweave.train.trainer import train
from meshweave.world import launch


def run_in(form: str, family: str, folder: Path) -> RunConfig:
    config, layout = FAMILIES[family](), FORMS[form]
    encoders = {name: layout.encoders for name in ENCODERS if has_encoder(config, name)}
    tree = {
        "model": str(write_model_folder(config, folder)),
        "modules": {**encoders, "language": layout.language | OPTIONS.get((family, form), {})},
        "train": {"steps": 1, "batch_size": 6, "microbatches": 2, "lr": 1e-3},
        "dtype": "float64",
        "weights": "seeded",
        "seed": 3,
        "timeout_seconds": 60,
    }
    return parse_config(tree | layout.run)


@pytest.mark.parametrize(("family", "form"), cases())
def test_a_family_equals_the_single_process(family: str, form: str, tmp_path: Path) -> None:
    run = run_in(form, family, tmp_path)
    config = FAMILIES[family]()
    check_model(run, config)
    report = verified(run, steps=1)
    assert report.passed, report
    assert report.media_items > 6
    data = SyntheticDataset(config, 6, seed=3)
    kinds = sorted({item.kind for sample in range(6) for item in data.meta(sample).media})
    record(family, form, FORMS[form].columns, kinds, report.gradient.error)


@pytest.mark.parametrize(("family", "form"), REFUSED)
def test_what_a_family_cannot_do_is_refused_in_one_message(family: str, form: str, tmp_path: Path) -> None:
    column = FORMS[form].columns[-1]
    with pytest.raises((ConfigError, LayoutError), match=REFUSED[family, form]) as caught:
        check_model(run_in(form, family, tmp_path), FAMILIES[family]())
    assert "; set it" in str(caught.value)
    record(family, form, (column,), [], None)


def test_what_a_model_stores_beside_parameters_is_read_and_written(tmp_path: Path) -> None:
    """Gemma 4 scales every layer by a stored buffer."""
    config = FAMILIES["gemma4"]()
    folder = write_model_folder(config, tmp_path / "model", weights=True)
    tree = {
        "model": str(folder),
        "modules": {"vision": module("0"), "language": module("0")},
        "data": {"source": "synthetic"},
        "train": {"steps": 1, "batch_size": 4, "lr": 1e-3},
        "output": str(tmp_path / "out"),
    }
    summary = launch(parse_config(tree), lambda world, run: train(world, run, config))
    assert summary is not None
    before, after = (load_file(path / "model.safetensors") for path in (folder, summary.model))
    scales = [name for name in before if "layer_scalar" in name]
    assert len(scales) == 3
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in scales)


def test_the_documented_table_lists_nothing_that_no_test_runs() -> None:
    proven = {(family, column) for family, form in cases() for column in FORMS[form].columns}
    refused = {(family, column) for family, form in REFUSED for column in FORMS[form].columns}
    table = json.loads((DOCS / "families.json").read_text())
    for family, entry in table.items():
        for column, error in entry["columns"].items():
            assert (family, column) in (proven if error is not None else refused), (family, column)
            assert error is None or error < 1e-9
    assert (DOCS / "families.md").read_text() == markdown(table, COLUMNS)


def test_proven_families_are_those_of_the_table() -> None:
    assert {make().model_type for make in FAMILIES.values()} == PROVEN
