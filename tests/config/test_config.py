"""Is every wrong run file refused by key, value and fix, and every right one read as meant?"""

import time
from copy import deepcopy

import pytest
import yaml

from meshweave.config import ModuleConfig, RunConfig, load_config, parse_config
from meshweave.errors import ConfigError

RIGHT = {
    "model": "models/tiny",
    "modules": {"vision": {"ranks": "0-3"}, "language": {"ranks": "0-3", "tp": 2}},
    "train": {"steps": 3, "batch_size": 8},
}
GONE = object()


def _changed(*changes):
    """The right run file with dotted keys set, or taken out where the value is GONE."""
    tree = deepcopy(RIGHT)
    for key, value in changes:
        *parents, last = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    return tree


def _written(tmp_path, tree=RIGHT):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_right_run_file_is_read_as_written(tmp_path):
    run = load_config(_written(tmp_path))
    assert (run.modules["vision"].ranks, run.modules["vision"].dp) == ((0, 1, 2, 3), 4)
    assert (run.modules["language"].tp, run.modules["language"].dp) == (2, 2)
    assert (run.world_size, run.encoders) == (4, ("vision",))
    assert run.train.microbatches == 1
    assert run.data is None


@pytest.mark.parametrize(
    ("written", "ranks"),
    [
        ("0-3", (0, 1, 2, 3)),
        ("0,2,4-7", (0, 2, 4, 5, 6, 7)),
        (" 0 - 1 , 3 ", (0, 1, 3)),
        ("5", (5,)),
        (5, (5,)),
        ([0, 2], (0, 2)),
    ],
)
def test_ranks_may_be_written_in_several_ways(written, ranks):
    assert ModuleConfig(ranks=written).ranks == ranks


@pytest.mark.parametrize(
    ("module", "dp"),
    [
        ({"ranks": "0-7"}, 8),
        ({"ranks": "0-7", "tp": 2}, 4),
        ({"ranks": "0-7", "tp": 2, "cp": 2}, 2),
        ({"ranks": "0-7", "pp": 2, "replicas": 4}, 1),
        ({"ranks": 3}, 1),
    ],
)
def test_dp_fills_the_ranks_that_the_other_sizes_leave(module, dp):
    assert ModuleConfig(**module).dp == dp


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert parse_config(_changed(("train.lr", "1e-4"))).train.lr == 1e-4


def test_the_world_reaches_to_the_highest_rank_idle_ones_included():
    assert parse_config(_changed(("idle_ranks", "4-5"))).world_size == 6
    assert parse_config(_changed(("modules.language.ranks", "4-7"))).world_size == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # unknown and missing keys
        (
            ("modul", "x"),
            r"modul: unknown key; did you mean model\?|modul: unknown key; did you mean modules\?",
        ),
        (("modules.vision.tpp", 2), r"modules\.vision\.tpp: unknown key; did you mean tp\?"),
        (("train.stepss", 2), r"train\.stepss: unknown key; did you mean steps\?"),
        (("train.zzz", 2), r"train\.zzz: unknown key; there is no such option \(keys: batch_size.*weight_decay"),
        (("model", GONE), r"model: this key is required"),
        (("train.steps", GONE), r"train\.steps: this key is required"),
        (("modules.vision.ranks", GONE), r"modules\.vision\.ranks: this key is required$"),
        (("modules.language", GONE), r"no 'language' among \['vision'\]; every run has a language model"),
        (("modules", {}), r"modules: .*at least 1 item.*\(got \{\}\)"),
        (("modules.vision", None), r"modules\.vision: .*expected keys with values, got None"),
        # sizes and ranks
        (
            ("modules.vision.dp", 2),
            r"modules\.vision: dp 2 = 2 ranks, but `ranks` lists 4; change a size or the ranks",
        ),
        (("modules.vision.tp", 3), r"modules\.vision: dp 1 × tp 3 = 3 ranks, but `ranks` lists 4; change"),
        (("modules.vision.cp", 8), r"modules\.vision: dp 1 × cp 8 = 8 ranks, but `ranks` lists 4; change"),
        (("modules.vision.tp", 0), r"modules\.vision\.tp: .*greater than 0 \(got 0\)"),
        (("modules.vision.tp", "two"), r"modules\.vision\.tp: .*integer.*\(got 'two'\)"),
        (
            ("modules.vision.ranks", "0-3,2"),
            r"modules\.vision: ranks \[2\] are listed twice; every rank holds one",
        ),
        (("modules.vision.ranks", "0-"), r"modules\.vision\.ranks: expected .*0-3 or 0,2,4-7 \(got '0-'\)"),
        (("modules.vision.ranks", "a-b"), r"modules\.vision\.ranks: expected .*0-3 or 0,2,4-7 \(got 'a-b'\)"),
        (("modules.vision.ranks", []), r"modules\.vision\.ranks: .*at least 1 item.*\(got \[\]\)"),
        (
            ("modules.vision.ranks", [0, -1]),
            r"modules\.vision\.ranks\.1: .*greater than or equal to 0 \(got -1\)",
        ),
        (("modules.vision.ranks", True), r"modules\.vision\.ranks: .*\(got True\)"),
        (
            ("modules.language.ranks", "6-7"),
            r"ranks \[4, 5\] belong to no module; give them to one, or .*`idle_ranks`",
        ),
        (("idle_ranks", "3-4"), r"idle_ranks lists ranks \[3\], which modules use; take them out of one"),
        (("idle_ranks", "x"), r"^  idle_ranks: expected .* \(got 'x'\)$"),
        # values
        (("dtype", "float16"), r"dtype: .*'float32', 'bfloat16' or 'float64' \(got 'float16'\)"),
        (("weights", "random"), r"weights: .*'pretrained' or 'seeded' \(got 'random'\)"),
        (
            ("modules.vision.data_parallel", "x"),
            r"modules\.vision\.data_parallel: .*'shard' or 'replicate' \(got 'x'\)",
        ),
        (("train.steps", 0), r"train\.steps: .*greater than 0 \(got 0\)"),
        (("train.lr", -1), r"train\.lr: .*greater than 0 \(got -1\)"),
        (("train.betas", [0.9, 1.0]), r"train\.betas\.1: .*less than 1 \(got 1\.0\)"),
        (("train.min_lr_ratio", 2), r"train\.min_lr_ratio: .*less than or equal to 1 \(got 2\)"),
        (("train.warmup_steps", -1), r"train\.warmup_steps: .*\(got -1\)"),
        (("node_size", 0), r"node_size: .*greater than 0 \(got 0\)"),
        (("timeout_seconds", 0), r"timeout_seconds: .*greater than 0 \(got 0\)"),
        (("seed", -1), r"seed: .*\(got -1\)"),
        # data
        (("data", {}), r"data: source files needs `path`"),
        (("data.source", "coco"), r"data\.source: .*'files', 'digits' or 'synthetic' \(got 'coco'\)"),
        (("data.source", "files"), r"data: source files needs `path`, the file or folder to read"),
        (("modules.vison", {"dp": 2}), r"modules\.vison: unknown module; did you mean vision\?"),
        (
            ("modules.text_tower", {"ranks": "0"}),
            r"modules\.text_tower: unknown module; a model has some of language, vision, audio",
        ),
        (("train.epochs", 3), r"train\.epochs: unknown key; .*give `steps`"),
        (("train.save_every", 3), r"train\.save_every: unknown key; there is no such option"),
        (("train.learning_rate", 3), r"train\.learning_rate: unknown key; it is called `lr` here"),
        (("train.microbatch", 3), r"train\.microbatch: unknown key; did you mean microbatches\?"),
        (("modules.vision.rank", "0"), r"modules\.vision\.rank: unknown key; did you mean ranks\?"),
        (("data.max_lenght", 3), r"data\.max_lenght: unknown key; did you mean max_length\?"),
        (("data", {"source": "digits", "samples": 0}), r"data\.samples: .*greater than 0 \(got 0\)"),
        (("data", {"source": "digits", "on_error": "x"}), r"data\.on_error: .*'skip' or 'stop' \(got 'x'\)"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_wrong_key_is_refused_naming_key_value_and_fix(change, message):
    with pytest.raises(ConfigError) as error:
        parse_config(_changed(change))
    lines = str(error.value).splitlines()
    assert lines[0] == "run configuration:"
    assert len(lines) == 2, lines
    with pytest.raises(ConfigError, match=f"(?m){message}"):
        parse_config(_changed(change))


def test_all_wrong_keys_are_named_at_once():
    wrong = _changed(("modules.vision.tpp", 2), ("train.steps", 0), ("dtype", "float16"))
    with pytest.raises(ConfigError) as error:
        parse_config(wrong)
    text = str(error.value)
    assert [key in text for key in ("modules.vision.tpp", "train.steps", "dtype")] == [True] * 3


def test_overrides_set_and_add_keys(tmp_path):
    run = load_config(
        _written(tmp_path),
        ["modules.vision.tp=2", "modules.language.ranks=4-7", "data.source=synthetic", "train.lr=1e-2"],
    )
    assert (run.modules["vision"].tp, run.modules["vision"].dp) == (2, 2)
    assert run.modules["language"].ranks == (4, 5, 6, 7)
    assert run.data.source == "synthetic"
    assert run.train.lr == 0.01
    assert load_config(_written(tmp_path), ["train.max_grad_norm=null"]).train.max_grad_norm is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "modules.vision.tp",
            r"--set modules\.vision\.tp: expected KEY=VALUE, such as modules\.vision\.dp=2",
        ),
        ("=3", r"--set =3: expected KEY=VALUE"),
        ("model.x=1", r"--set model\.x=1: model is 'models/tiny', which has no keys inside"),
        ("seed=[", r"--set seed=\[: '\[' is not a YAML value"),
        ("modules.vision.dp=3", r"modules\.vision: dp 3 = 3 ranks, but `ranks` lists 4"),
        ("trian.steps=3", r"trian: unknown key; did you mean train\?"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(_written(tmp_path), [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"run\.yaml: there is no such run file \(looked in /"),
        (b"model: [", r"run\.yaml: not readable as YAML"),
        (b"\xff\xfe\x00bad", r"run\.yaml: not readable as YAML"),
        (b"- a\n- b\n", r"run\.yaml: a run file is a mapping.*got list"),
        (b"", r"run\.yaml: a run file is a mapping.*got NoneType"),
    ],
)
def test_unreadable_run_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_configuration_cannot_be_changed_after_it_was_checked():
    run = parse_config(RIGHT)
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 4


def test_only_model_modules_and_train_are_required():
    assert {"model", "modules", "train"} == {name for name, field in RunConfig.model_fields.items() if field.is_required()}


def test_a_run_of_4096_ranks_is_checked_quickly():
    tree = _changed(("modules.vision.ranks", "0-4095"), ("modules.language.ranks", "0-4095"))
    start = time.perf_counter()
    assert parse_config(tree).world_size == 4096
    assert time.perf_counter() - start < 0.5


def test_only_packed_sequences_have_a_token_budget():
    train = {"steps": 1, "batch_size": 4, "max_tokens": 4096}
    tree = {"model": "unused", "train": train, "modules": {"vision": {"ranks": "0-1"}, "language": {"ranks": "0-1"}}}
    with pytest.raises(ConfigError, match=r"train\.max_tokens=4096: only packed sequences .* set train\.pack: true"):
        parse_config(tree)
    assert parse_config(tree | {"train": train | {"pack": True}}).packed
    for language, packed in [({"cp": 2}, True), ({"tp": 2}, True), ({"tp": 2, "sequence_parallel": False}, False)]:
        cut = tree | {"modules": {"vision": {"ranks": "0-1"}, "language": {"ranks": "0-1", **language}}}
        if packed:
            assert parse_config(cut).packed
        else:
            with pytest.raises(ConfigError, match="token budget"):
                parse_config(cut)
