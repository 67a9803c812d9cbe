# SPDX-License-Identifier: Apache-2.0
"""Names on the Hugging Face hub: found in a cache made here, and got from a hub of our own.

There is no network: the cache is a folder laid out as `huggingface_hub` does, and the hub a
server of this process.
"""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from test_transfer import checkpoint

from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.interop.hub import find_source

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  folder = tmp_path / "cache" / "hub"
  folder.mkdir(parents=True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
  monkeypatch.chdir(tmp_path)
  return folder


def put(cache: Path, name: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
  """A snapshot of a repository in the cache: links into its blobs."""
  home = cache / f"models--{name.replace('/', '--')}"
  snapshot = home / "snapshots" / commit
  for folder in (home / "refs", home / "blobs", snapshot):
    folder.mkdir(parents=True, exist_ok=True)
  if commit == COMMIT:
    (home / "refs" / "main").write_text(commit)
  for number, (file, content) in enumerate(files.items()):
    blob = home / "blobs" / f"{commit[0]}{number}"
    blob.write_bytes(content)
    (snapshot / file).parent.mkdir(exist_ok=True)
    (snapshot / file).symlink_to(blob)
  return snapshot


PLAIN = {"config.json": b"{}", "model.safetensors": b""}


def test_a_name_is_its_snapshot(cache: Path):
  newest, older = put(cache, "org/name", PLAIN), put(cache, "org/name", PLAIN, OLDER)
  assert find_source("org/name") == newest
  assert find_source("org/name", revision=OLDER) == older
  assert find_source("org/name", revision="main") == newest
  (cache / "models--org--name" / "refs" / "v1").write_text(OLDER)
  assert find_source("org/name", revision="v1") == older


def test_a_path_wins_over_a_name(cache: Path, tmp_path: Path):
  put(cache, "org/name", PLAIN)
  (tmp_path / "org" / "name").mkdir(parents=True)
  assert find_source("org/name") == Path("org/name")
  with pytest.raises(ConfigError, match="has no revisions"):
    find_source("org/name", revision="main")


def test_one_gguf_file_of_a_repository(cache: Path):
  one = put(cache, "org/one", {"a.Q4_0.gguf": b"GGUF", "README.md": b""})
  assert find_source("org/one") == one / "a.Q4_0.gguf"
  two = put(cache, "org/two", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
  assert find_source("org/two/b.gguf") == two / "b.gguf"
  with pytest.raises(CheckpointError, match=r"has 2 GGUF files: a\.gguf, b\.gguf") as error:
    find_source("org/two")
  assert "org/two/a.gguf" in error.value.cure


@pytest.mark.parametrize("name", ["org/name", "org/name/a.gguf", "org/half"])
def test_what_the_cache_lacks(name: str, cache: Path):
  put(cache, "org/half", {"config.json": b"{}"})  # as after AutoConfig.from_pretrained
  for revision in (None, "v9"):
    with pytest.raises(CheckpointError) as error:
      find_source(name, revision=revision)
    assert str(cache) in error.value.cause and "--download" in error.value.cure
    assert "\n" not in error.value.cause


def test_what_is_there_without_weights_is_told_from_what_is_not(cache: Path):
  put(cache, "org/half", {"config.json": b"{}", "pytorch_model.bin": b""})
  with pytest.raises(CheckpointError, match=r"org/half is in .* without safetensors"):
    find_source("org/half")


def test_what_is_no_name(cache: Path):
  assert find_source("x" * 5000) == Path("x" * 5000)
  for name in ("nothing", "a/b/c", "/a/b", "../a", "a/b/../c.gguf"):
    assert find_source(name) == Path(name)
    with pytest.raises(ConfigError, match="no name on the hub"):
      find_source(name, download=True)


def test_a_name_is_imported(cache: Path, in_process: Callable, tmp_path: Path):
  """By the command, which follows the links of the cache; its run has its name."""
  folder = checkpoint(tmp_path / "files", "llama_3", "llama", eos_token="</s>")
  put(cache, "org/Tiny", {path.name: path.read_bytes() for path in folder.iterdir()})
  done = in_process("import", "org/Tiny")
  assert done.returncode == 0, done.stderr
  assert (
    done.stdout.startswith("runs/Tiny: llama") and Path("runs/Tiny/config.json").exists()
  )
  missing = in_process("import", "org/Large", "run")
  assert missing.returncode == 4 and not Path("run").exists()
  assert len(missing.stderr.splitlines()) == 2 and str(cache) in missing.stderr


# -- A hub ---------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
  """What `huggingface_hub` asks of a hub, for one repository."""

  files: dict[str, bytes] = {}  # noqa: RUF012 - of the class, which a server makes objects of
  asked: list[str] = []  # noqa: RUF012

  def log_message(self, *_: Any) -> None:
    pass

  def do_HEAD(self) -> None:
    self.do_GET()

  def do_GET(self) -> None:
    path = self.path.partition("?")[0]
    self.asked.append(f"{self.command} {path}")
    headers = {"X-Repo-Commit": COMMIT}
    if path.startswith("/api/models/org/name"):
      siblings = [{"rfilename": name} for name in self.files]
      content = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
      if "/tree/" in path:
        tree = [
          {"type": "file", "path": name, "size": len(data), "oid": name}
          for name, data in self.files.items()
        ]
        content = json.dumps(tree).encode()
    elif path.startswith("/org/name/resolve/"):
      name = path.removeprefix("/org/name/resolve/").partition("/")[2]
      content = self.files[name]
      headers["ETag"] = f'"{name.replace("/", "-")}"'
    else:
      self.send_response(404)
      self.send_header("X-Error-Code", "RepoNotFound")
      self.send_header("Content-Length", "0")
      self.end_headers()
      return
    self.send_response(200)
    for key, value in headers.items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(content)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f"http://127.0.0.1:{server.server_port}"
  monkeypatch.setattr(constants, "ENDPOINT", address)
  monkeypatch.setattr(
    constants,
    "HUGGINGFACE_CO_URL_TEMPLATE",
    address + "/{repo_id}/resolve/{revision}/{filename}",
  )
  monkeypatch.setattr(Hub, "files", dict(PLAIN))
  monkeypatch.setattr(Hub, "asked", [])
  yield Hub
  server.shutdown()
  server.server_close()


def test_what_an_import_reads_is_downloaded(hub: type[Hub], cache: Path):
  hub.files |= {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"again"}
  hub.files |= {"tokenizer.json": b"{}", "original/a.safetensors": b"again"}
  hub.files |= {"README.md": b"# A card", "LICENSE": b"terms", "picture.png": b"png"}
  folder = find_source("org/name", download=True)
  assert folder.is_relative_to(cache)
  assert sorted(path.name for path in folder.iterdir()) == [
    "LICENSE",
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
  ]
  asked = len(hub.asked)
  assert find_source("org/name") == folder and len(hub.asked) == asked  # no network


def test_a_gguf_file_is_downloaded(hub: type[Hub]):
  hub.files = {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"}
  assert find_source("org/name/b.gguf", download=True).read_bytes() == b"GGUF b"
  with pytest.raises(CheckpointError, match="has 2 GGUF files"):
    find_source("org/name", download=True)
  hub.files = {"pytorch_model.bin": b"pickle"}
  with pytest.raises(CheckpointError, match="neither safetensors nor GGUF"):
    find_source("org/name", download=True)


def test_what_cannot_be_downloaded(hub: type[Hub], monkeypatch: Any):
  with pytest.raises(CheckpointError, match="org/other cannot be downloaded") as error:
    find_source("org/other", download=True)
  assert "\n" not in error.value.cause
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(CheckpointError, match=r"cannot be downloaded.*offline"):
    find_source("org/name", download=True)
