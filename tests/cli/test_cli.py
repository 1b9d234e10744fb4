"""What a person types, and what they read back: exit codes and messages of the commands, run as they would be."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.models import CONFIGS, write_model_folder
from transformers import Qwen3Config
from typer.testing import CliRunner

from meshweave.cli import app
from meshweave.report.chrome_trace import read_chrome_trace


def write_run(tmp_path: Path, **changes: Any) -> Path:
    folder = write_model_folder(CONFIGS["llava"](), tmp_path / "model", weights=True)
    tree: dict[str, Any] = {
        "model": str(folder),
        "modules": {"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "0-1", "tp": 2}},
        "data": {"source": "synthetic", "eval_samples": 6},
        "train": {"steps": 3, "batch_size": 6},
        "output": str(tmp_path / "out"),
        "timeout_seconds": 60,
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree | changes))
    return file


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_train_ends_with_a_summary(tmp_path: Path) -> None:
    code, output = run("train", str(write_run(tmp_path)))
    assert code == 0, output
    for expected in ("held-out answers", "tokens/s", "model FLOPs, vision", "boundary, vision", "loss.png"):
        assert expected in output
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_train_joins_a_world_that_torchrun_made(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [*launcher, "-m", "meshweave", "train", str(write_run(tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("held-out answers") == 1


def test_inspect_prints_every_rank_and_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **k: pytest.fail("inspect started a process group"))
    code, output = run("inspect", str(write_run(tmp_path)))
    assert code == 0, output
    assert "2 ranks" in output
    assert "tp 0/2" in output
    assert "vision → language" in output
    assert (tmp_path / "out" / "layout.png").exists()


def test_inspect_reads_a_layout_of_thousands_of_ranks(tmp_path: Path) -> None:
    modules = {
        "vision": {"ranks": "0-4095", "dp": 4096},
        "language": {"ranks": "0-4095", "pp": 2, "dp": 256, "cp": 2, "tp": 4},
    }
    code, output = run("inspect", str(write_run(tmp_path, modules=modules, train={"steps": 1, "batch_size": 256})))
    assert code == 0, output
    assert "4,096 ranks" in output or "4096 ranks" in output


def test_verify_passes_and_says_so(tmp_path: Path) -> None:
    code, output = run("verify", str(write_run(tmp_path)), "--steps", "2", "--json")
    report = json.loads(output)
    assert code == 0
    assert report["passed"] is True
    assert report["gradient"]["error"] < 1e-9
    assert report["samples"] == 12


def test_verify_of_a_shrunk_model_needs_neither_weights_nor_data(tmp_path: Path) -> None:
    file = write_run(tmp_path, data=None)
    (tmp_path / "model" / "model.safetensors").unlink()
    code, output = run("verify", str(file), "--shrink", "--steps", "1")
    assert code == 0, output
    assert "same as the single process" in output


def test_verify_past_the_tolerance_exits_non_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.step.run.sum_partial_gradients", lambda module, mesh: None)
    code, output = run("verify", str(write_run(tmp_path)), "--steps", "1")
    assert code == 1
    assert "NOT the same" in output
    assert "norm" in output


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("modules.vision.dq=2", "modules.vision.dq: unknown key"),
        ("modules.vision.dp=3", "modules.vision: dp 3"),
        ("modules.language.tp=3", "modules.language"),
        ("modules.vision.ranks=[0,0]", "listed twice"),
        ("modules.vision.ranks=[1,0]", "must ascend"),
        ("modules.vision.ranks=1-0", "runs backwards"),
        ("modules.audio={ranks: 0-1, dp: 2}", "modules.audio: a llava model has no such module"),
        ("model=/nowhere", "'/nowhere' holds no config.json"),
        ("train.batch_size=1", "train.batch_size=1: fewer samples than"),
        ("train.batch_size=0", "train.batch_size"),
        ("data={source: files, path: /nowhere.json}", "/nowhere.json: no such data file"),
        ("data.sorce=digits", "did you mean source?"),
        ("nonsense", "expected KEY=VALUE"),
        ("train={steps: 1, batch_size: 6, max_tokens: 9}", "train.max_tokens=9: only packed sequences have a token budget"),
        ("train={steps: 1, batch_size: 6, pack: true, max_tokens: 200}", "train.max_tokens=200: a step of"),
        ("data.path=/tmp", "path: source synthetic does not read this"),
        ("train.warmup_steps=99", "warmup_steps=99 is more than steps=3"),
    ],
)
def test_a_wrong_run_is_refused_in_one_message_before_a_process_starts(
    override: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshweave.world.launch", lambda *a: pytest.fail("a process would have started"))
    modules = {"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "0-1", "dp": 2}}
    code, output = run("train", str(write_run(tmp_path, modules=modules)), "--set", override)
    assert code == 2, output
    assert expected in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({"vision": {"ranks": "0-3", "cp": 4}, "language": {"ranks": "0-3", "dp": 4}}, "modules.vision: its model does not take"),
        ({"vision": {"ranks": "0-3", "dp": 4}, "language": {"ranks": "0-3", "pp": 4}}, "modules.language.pp=4: more stages than"),
        (
            {"vision": {"ranks": "0-3", "replicas": 4}, "language": {"ranks": "0-3", "replicas": 4}},
            "modules.language.replicas=4: only encoders",
        ),
        (
            {"vision": {"ranks": "0-1", "dp": 2, "context_parallel": "ring"}, "language": {"ranks": "0-1", "dp": 2}},
            "modules.vision.context_parallel: only the language model reads this",
        ),
        (
            {"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "0-1", "dp": 2, "context_parallel": "ulysses"}},
            "modules.language.context_parallel=ulysses: cp is 1",
        ),
        ({"vision": {"ranks": "0-2", "tp": 3}, "language": {"ranks": "0-2", "dp": 3}}, "does not divide num_attention_heads=4"),
        ({"vision": {"ranks": "0-1", "dp": 2}}, "there is no 'language'"),
        ({"language": {"ranks": "0-1", "dp": 2}}, "modules.vision: missing"),
        ({"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "3", "dp": 1}}, "ranks [2] belong to no module"),
    ],
)
def test_layouts_that_cannot_run_are_refused_with_the_key(modules: Any, expected: str, tmp_path: Path) -> None:
    code, output = run("train", str(write_run(tmp_path, modules=modules)))
    assert code == 2, output
    assert expected in output


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("output=/proc/nothing", "output='/proc/nothing': cannot be created"),
        ("train=", "train: expected keys with values, got None"),
        ("data.samples=5", "the data holds 5 samples, a step takes 6"),
    ],
)
def test_what_only_shows_later_is_refused_early(override: str, expected: str, tmp_path: Path) -> None:
    code, output = run("train", str(write_run(tmp_path)), "--set", override)
    assert code == 2, output
    assert expected in output


@pytest.mark.parametrize("damage", ["missing", "cut", "other shape"])
def test_weights_that_do_not_fit_are_refused_before_a_process_starts(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshweave.world.launch", lambda *a: pytest.fail("a process would have started"))
    file = write_run(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config = CONFIGS["llava"]()
        config.text_config.vocab_size = 104
        config.save_pretrained(tmp_path / "model")
    code, output = run("train", str(file))
    assert code == 2, output
    expected = {"missing": "no *.safetensors file", "cut": "not readable as safetensors", "other shape": "has shape (96, 32)"}
    assert expected[damage] in output


def test_a_model_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    file = write_run(tmp_path)
    Qwen3Config().save_pretrained(tmp_path / "model")
    code, output = run("train", str(file))
    assert code == 2
    assert "transformers knows no model of media and text of type 'qwen3'" in output


def test_a_fault_says_where_it_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("meshweave.step.worker.StepWorker._language_forward", broken)
    modules = {"vision": {"ranks": 0}, "language": {"ranks": 0}}
    with pytest.raises(RuntimeError, match="out of luck") as fault:
        run("train", str(write_run(tmp_path, modules=modules)))
    assert fault.value.__notes__ == ["on rank 0, in language.0F0"]


def test_balance_shows_padding_imbalance_and_gain_and_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **k: pytest.fail("balance started a process group"))
    monkeypatch.setattr("meshweave.data.synthetic.SyntheticDataset.media", lambda *a: pytest.fail("balance made pixels"))
    modules = {"vision": {"ranks": "0-3"}, "language": {"ranks": "0-3", "tp": 2}}
    train = {"steps": 3, "batch_size": 24, "microbatches": 2, "pack": True, "max_tokens": 600}
    file = str(write_run(tmp_path, modules=modules, train=train))
    code, output = run("balance", file)
    assert code == 0, output
    for expected in (
        "3 steps · 72 samples",
        "packed ◂",
        "vision lanes, per pass",
        "padding",
        "of train.max_tokens=600",
    ):
        assert expected in output
    code, output = run("balance", file, "--steps", "2", "--json")
    assert code == 0, output
    report = json.loads(output)
    assert (report["steps"], report["samples"], report["lanes"]) == (2, 48, {"vision": 4, "language": 2})
    in_order, dealt, planned, packed = report["variants"]
    assert in_order["padding"] > planned["padding"] > packed["padding"]
    assert max(packed["padding"], dealt["padding"]) < 0.01  # to multiples of tp alone
    assert dealt["times_as_fast"] < packed["times_as_fast"]
    assert in_order["times_as_fast"] == 1 < planned["times_as_fast"] < packed["times_as_fast"]
    for what in packed["imbalance"]:
        assert packed["imbalance"][what]["ratio"] < in_order["imbalance"][what]["ratio"]


def test_balance_says_which_step_does_not_fit(tmp_path: Path) -> None:
    train = {"steps": 3, "batch_size": 24, "microbatches": 2, "pack": True, "max_tokens": 400}
    code, output = run("balance", str(write_run(tmp_path, train=train)))
    assert code == 2, output
    assert "step 0: train.max_tokens=400: a step of 24 samples has" in output


PIPELINE = {"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "0-1", "pp": 2}}


def test_simulate_prints_step_time_and_bubbles_and_draws_them(tmp_path: Path) -> None:
    file = write_run(
        tmp_path, modules=PIPELINE, schedule={"encoders": "nested"}, train={"steps": 2, "batch_size": 6, "microbatches": 3}
    )
    code, output = run("simulate", str(file), "--tflops", "1", "--gbps", "10")
    assert code == 0, output
    assert "bubble" in output
    assert "stage 1" in output
    assert "at 1 TFLOP/s and messages at 10 GB/s" in output
    picture, trace = (tmp_path / "out" / name for name in ("timeline.png", "timeline.json"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert read_chrome_trace(trace).seconds > 0


def test_a_traced_step_can_be_simulated_from_its_own_durations(tmp_path: Path) -> None:
    file = write_run(tmp_path, modules=PIPELINE, train={"steps": 2, "batch_size": 6, "microbatches": 3})
    code, output = run("train", str(file), "--trace")
    assert code == 0, output
    assert (tmp_path / "out" / "measured.png").read_bytes().startswith(b"\x89PNG")
    measured = read_chrome_trace(tmp_path / "out" / "measured.json")
    assert [len(spans) for spans in measured.spans] == [12, 12]  # gather twice, encoder, 3 microbatches, and back
    code, output = run("simulate", str(file), "--measured", str(tmp_path / "out" / "measured.json"))
    assert code == 0, output
    assert "measured step" in output
    assert "simulated from its medians" in output


def test_a_schedule_that_cannot_be_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    file = write_run(tmp_path, modules=PIPELINE, train={"steps": 2, "batch_size": 6, "microbatches": 3})
    code, output = run("train", str(file), "--set", "modules.language.max_in_flight=1")
    assert code == 2, output
    assert "rank 0: language holds the activations of 2 microbatches at once, modules.language.max_in_flight=1" in output
