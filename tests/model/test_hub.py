"""A model's id stands for the files that a command needs of it, from the Hub or from the cache; else there is one message."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from meshweave.model.hub import FILES

COMMIT = "a" * 40
CONTENT = {
    "config.json": b'{"model_type": "llava"}',
    "preprocessor_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"hello",
    "model-00001-of-00001.safetensors": b"weights",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"other weights",
    "original/model.safetensors": b"other weights",
    "README.md": b"a card",
}


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers of one small repository."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/small/tree/"):
            return self.send(json.dumps([self.entry(name) for name in CONTENT]).encode(), body)
        if path.startswith("/api/models/org/small"):
            if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", COMMIT):
                return self.send(b"{}", body, 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in CONTENT]
            return self.send(json.dumps({"id": "org/small", "sha": COMMIT, "siblings": siblings}).encode(), body)
        if path.startswith("/api/models/org/gated"):
            return self.send(b"{}", body, 403, {"X-Error-Code": "GatedRepo"})
        name = path.partition(f"/org/small/resolve/{COMMIT}/")[2]
        if name in CONTENT:
            self.asked.append(f"{self.command} {name}")
            etag = hashlib.sha1(CONTENT[name]).hexdigest()
            return self.send(CONTENT[name], body, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        return self.send(b"{}", body, 404, {"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(CONTENT[name]), "oid": hashlib.sha1(CONTENT[name]).hexdigest()}

    def send(self, content: bytes, body: bool, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASK = """
import sys
from meshweave.config import parse_config
from meshweave.errors import CheckpointError
from meshweave.model.hub import with_local_model
tree = {"modules": {"language": {"ranks": "0"}}, "train": {"steps": 1, "batch_size": 1}}
for line in sys.argv[1:]:
    model, need, *revision = line.split()
    run = parse_config(tree | {"model": model} | ({"revision": revision[0]} if revision else {}))
    try:
        print(with_local_model(run, need).model)
    except CheckpointError as error:
        print("error:", error)
"""


def ask(home: Path, *lines: str, endpoint: str | None = None) -> list[str]:
    """What becomes of models and needs, in a process of its own: the Hub's library reads the environment when it is imported."""
    environment = os.environ | {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        **({"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} if endpoint else {"HF_HUB_OFFLINE": "1"}),
    }
    done = subprocess.run([sys.executable, "-c", ASK, *lines], env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def wanted(need: Any) -> list[str]:
    return sorted(name for name in CONTENT if "/" not in name and any(fnmatch(name, pattern) for pattern in FILES[need]))


def test_only_the_files_that_are_needed_come_and_once_here_need_no_net(tmp_path: Path, endpoint: str) -> None:
    files = {}
    for need in ("config", "processor", "weights"):
        (folder,) = ask(tmp_path, f"org/small {need}", endpoint=endpoint)
        files[need] = sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())
        assert files[need] == wanted(need)
    assert files["config"] == ["config.json"]
    assert "pytorch_model.bin" not in files["weights"]
    assert "model-00001-of-00001.safetensors" in files["weights"]
    assert ask(tmp_path, "org/small weights", f"org/small config {COMMIT}") == [folder, folder]


def test_what_cannot_be_had_gets_one_message(tmp_path: Path, endpoint: str) -> None:
    there = ask(tmp_path, "org/none config", "org/gated config", "org/small config v9", endpoint=endpoint)
    assert there[0].startswith("error: model: there is no folder 'org/none' in ")
    assert there[0].endswith("and no model org/none on the Hub")
    assert there[1].startswith("error: model: org/gated is gated; ask for access")
    assert there[2] == "error: model: org/small has no revision 'v9' on the Hub; check `revision`"
    (offline,) = ask(tmp_path, "org/other config")
    assert "org/other can be had neither from the Hub nor from its cache" in offline


def test_what_is_a_path_is_left_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "org" / "local").mkdir(parents=True)
    assert ask(tmp_path, "org/local weights", "./x weights", "a/b/c weights") == ["org/local", "x", "a/b/c"]
