# SPDX-License-Identifier: Apache-2.0
"""What an import is given by mistake or by malice: one line says what it is."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from test_huggingface import rewrite
from test_transfer import MOST, checkpoint

from flaxlm.decoding.encoding import embed_texts
from flaxlm.decoding.loading import load_run
from flaxlm.errors import CheckpointError, ConfigError, FlaxLMError
from flaxlm.interop.files import has_file
from flaxlm.interop.safetensors import is_finite
from flaxlm.interop.transfer import export_run, import_run
from flaxlm.sharding import make_mesh

IDS = {"bos_token_id": 66, "eos_token_id": 66}


@pytest.fixture(scope="module")
def mesh() -> Any:
  return make_mesh({"data": -1})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("original") / "hub"
  return checkpoint(folder, "gpt2", "gpt2", eos_token="<|endoftext|>", ids=IDS)


@pytest.fixture
def hub(original: Path, tmp_path: Path) -> Path:
  return Path(shutil.copytree(original, tmp_path / "hub"))


def refusal(folder: Path, mesh: Any) -> FlaxLMError:
  """The error of an import, which leaves nothing behind."""
  run = folder.parent / "run"
  with pytest.raises(FlaxLMError) as error:
    import_run(folder, run, mesh)
  assert not run.exists() and not [*run.parent.glob(".run*")]
  assert "Errno" not in str(error.value) and "\n" not in error.value.cause
  return error.value


# -- Not a checkpoint ----------------------------------------------------------------------


def test_nothing_is_there(mesh: Any, tmp_path: Path):
  error = refusal(tmp_path / "gpt2", mesh)
  assert "does not exist" in error.cause and "GGUF" in error.cure


def test_a_file_is_not_a_folder(mesh: Any, hub: Path, tmp_path: Path):
  error = refusal(hub / "model.safetensors", mesh)
  assert "not a folder" in error.cause and str(hub) in error.cure
  (tmp_path / "ggufs").mkdir()
  for name in ("a.gguf", "b.gguf"):
    (tmp_path / "ggufs" / name).write_bytes(b"GGUF")
  error = refusal(tmp_path / "ggufs", mesh)
  assert "no config.json" in error.cause and "a.gguf, b.gguf" in error.cure


def test_an_adapter_is_not_a_model(mesh: Any, tmp_path: Path):
  folder = tmp_path / "lora"
  folder.mkdir()
  (folder / "adapter_model.safetensors").write_bytes(b"")
  for said, named in (('{"base_model_name_or_path": "a/b"}', "adapter of a/b"), ("[", "")):
    (folder / "adapter_config.json").write_text(said)
    error = refusal(folder, mesh)
    assert "LoRA adapter" in error.cause and named in error.cause and "--base" in error.cure


def test_a_model_of_the_cache_is_not_its_snapshot(mesh: Any, tmp_path: Path):
  folder = tmp_path / "models--a--b"
  (folder / "snapshots" / "abc").mkdir(parents=True)
  assert str(folder / "snapshots" / "abc") in refusal(folder, mesh).cure


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(mesh: Any, hub: Path, name: str):
  (hub / name).unlink()
  os.mkfifo(hub / name)
  assert refusal(hub, mesh).cause == f"{hub / name} is not a file"


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
def test_a_byte_order_mark_is_named(mesh: Any, hub: Path, mark: bytes):
  (hub / "config.json").write_bytes(mark + (hub / "config.json").read_bytes())
  error = refusal(hub, mesh)
  assert "byte order mark" in error.cause and "UTF-8" in error.cure


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_named(mesh: Any, hub: Path, name: str):
  text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
  (hub / name).write_text(text)
  error = refusal(hub, mesh)
  assert "Git LFS" in error.cause and "git lfs pull" in error.cure


# -- Links ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name",
  (
    *("merges.txt", "config.json", "tokenizer.json", "tokenizer_config.json"),
    *("generation_config.json", "model.safetensors"),
  ),
)
def test_no_link_out_of_the_folder_is_followed(
  mesh: Any, hub: Path, tmp_path: Path, name: str
):
  outside = tmp_path / "outside"
  outside.write_bytes((hub / name).read_bytes() if (hub / name).exists() else b"{}")
  (hub / name).unlink(missing_ok=True)
  (hub / name).symlink_to(outside)
  assert f"{name} is a link out of its folder" in refusal(hub, mesh).cause
  (hub / name).unlink()
  (hub / name).symlink_to("nowhere")
  assert "a link to a file that does not exist" in refusal(hub, mesh).cause


def test_links_of_the_hub_cache_are_followed(mesh: Any, hub: Path, tmp_path: Path):
  """`snapshots/REVISION/NAME` -> `../../blobs/HASH`."""
  model = tmp_path / "models--a--b"
  snapshot, blobs = model / "snapshots" / "abc", model / "blobs"
  snapshot.mkdir(parents=True)
  blobs.mkdir()
  for number, path in enumerate(sorted(hub.iterdir())):
    path.rename(blobs / str(number))
    (snapshot / path.name).symlink_to(f"../../blobs/{number}")
  import_run(snapshot, tmp_path / "run", mesh)
  copied = tmp_path / "run/huggingface/tokenizer_config.json"
  assert not copied.is_symlink()
  assert copied.read_bytes() == (snapshot / "tokenizer_config.json").read_bytes()
  # A blob that is itself a link leads elsewhere.
  (tmp_path / "secret").write_text("{}")
  (blobs / "more").symlink_to(tmp_path / "secret")
  (snapshot / "merges.txt").symlink_to("../../blobs/more")
  with pytest.raises(CheckpointError, match=r"merges\.txt is a link out"):
    has_file(snapshot / "merges.txt")


def test_an_export_follows_no_link_of_a_run(mesh: Any, hub: Path, tmp_path: Path):
  import_run(hub, tmp_path / "run", mesh)
  (tmp_path / "secret").write_text("secret")
  (tmp_path / "run/huggingface/merges.txt").symlink_to(tmp_path / "secret")
  with pytest.raises(CheckpointError, match=r"merges\.txt is a link out"):
    export_run(load_run(tmp_path / "run", mesh), tmp_path / "out", None, MOST)
  assert not (tmp_path / "out").exists()


# -- Numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("dtype", "value"),
  [
    (np.float32, np.nan),
    (jnp.bfloat16, np.inf),
    (np.float16, -np.inf),
    (np.float64, np.inf),
  ],
)
def test_weights_that_are_no_numbers_are_refused(
  mesh: Any, hub: Path, dtype: Any, value: float
):
  def spoil(arrays: dict[str, np.ndarray]) -> None:
    arrays["transformer.wpe.weight"][3, 4] = value

  rewrite(hub, lambda arrays: spoil(arrays) or arrays, dtype)
  error = refusal(hub, mesh)
  assert "transformer.wpe.weight" in error.cause and "NaN" in error.cause


def test_the_largest_numbers_are_numbers():
  for dtype in (np.float16, jnp.bfloat16, np.float32):
    most = jnp.finfo(dtype).max
    assert is_finite(np.array([[-most, most], [0, 1]], dtype))
    assert is_finite(np.zeros((0, 3), dtype)) and is_finite(np.array(most, dtype))
  assert is_finite(np.array([1e38])) and not is_finite(np.array([1e39]))


# -- A tokenizer with ids that the model lacks ---------------------------------------------


@pytest.mark.slow
def test_a_larger_tokenizer_is_told_and_its_ids_are_refused(mesh: Any, tmp_path: Path):
  hub = checkpoint(tmp_path / "hub", "gpt2", "gpt2", ids=IDS)
  _, notes = import_run(hub, tmp_path / "run", mesh)
  assert notes == [
    f"the tokenizer of {hub} has 283 ids, the model only 67: a text with one of the "
    "others is refused"
  ]
  encoder = checkpoint(tmp_path / "bert", "bert", "bert")
  config = json.loads((encoder / "config.json").read_text()) | {"vocab_size": 9}
  (encoder / "config.json").write_text(json.dumps(config))
  cut = ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")
  rewrite(encoder, lambda x: x | {name: x[name][:9] for name in cut})
  import_run(encoder, tmp_path / "run2", mesh)
  run = load_run(tmp_path / "run2", mesh)
  with pytest.raises(ConfigError, match="not in the model's vocabulary of 9"):
    embed_texts(run, ["the cat sat"])


@pytest.mark.parametrize("number", [slow(67), 10**5])
def test_special_ids_past_the_vocabulary_are_left_out_and_told(
  mesh: Any, hub: Path, number: int
):
  """67 is the least that the model lacks."""
  ids = {"bos_token_id": number, "eos_token_id": [66, number], "pad_token_id": number}
  told = f"special ids that the model lacks, which has 67, are left out: {number:,}"
  for n, said in enumerate((ids, ids | {"eos_token_id": number})):
    (hub / "generation_config.json").write_text(json.dumps(said))
    _, notes = import_run(hub, hub.parent / f"run{n}", mesh)
    tokenizer = load_run(hub.parent / f"run{n}", mesh).tokenizer
    assert tokenizer.eos_ids == ({66} if n == 0 else set())
    assert tokenizer.bos_id == (66 if n == 0 else 0)
    assert notes[0] == told + ("; nothing ends a completion but its length" if n else "")
