# SPDX-License-Identifier: Apache-2.0
"""The card of an export says what the run knows, and nothing else."""

import ast
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from test_transfer import MOST, checkpoint, own_run

from flaxlm.config import Config, LoraConfig, ModelConfig
from flaxlm.decoding.loading import Run, load_run
from flaxlm.errors import ConfigError
from flaxlm.interop.adapters import WEIGHTS, export_adapter, import_adapter, save_adapters
from flaxlm.interop.card import check_license, said_license
from flaxlm.interop.files import ABOUT_GGUF
from flaxlm.interop.gguf import export_gguf
from flaxlm.interop.safetensors import open_checkpoint, read_header
from flaxlm.interop.transfer import export_run, import_run
from flaxlm.nn.lora import abstract_adapters
from flaxlm.nn.models import build_model
from flaxlm.origin import find_origin, write_origin
from flaxlm.runs import IMPORTED_FILES, METRICS, TOKENIZER
from flaxlm.sharding import make_mesh

MODEL = ModelConfig(width=32, depth=1, context=64, num_heads=2)
THEIRS = "---\nlicense: apache-2.0\ntags: [x]\n---\n# Theirs\n"


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
  return make_mesh({"data": -1})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mesh: Any) -> Run:
  """At step 7; the metrics know what came after, too."""
  folder = own_run(tmp_path_factory.mktemp("card"), MODEL)
  lines = [
    {"step": 5, "eval/loss": 3.0, "eval/bits_per_byte": 2.0},
    {"step": 7, "eval/loss": 2.5, "eval/perplexity": 12.18, "eval/bits_per_byte": 1.75},
    {"step": 7, "train/loss": 2.25, "eval/expert_load/layer_0/expert_0": 0.5},
    {"step": 9, "eval/loss": 1.0, "eval/bits_per_byte": 0.5},
  ]
  (folder / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  return load_run(folder, mesh)


def with_corpus(run: Run, corpus: str) -> Run:
  data = dataclasses.replace(run.cfg.data, corpus=corpus)
  return run._replace(cfg=dataclasses.replace(run.cfg, data=data))


def read(folder: Path) -> tuple[dict[str, Any], str]:
  """The front matter and the text of a card whose code is code, and which the hub's own
  reader takes."""
  from huggingface_hub import ModelCard

  text = (folder / "README.md").read_text()
  _, front, body = text.split("---\n", 2)
  for python in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
    ast.parse(python)
  said = yaml.safe_load(front)
  assert ModelCard(text).data.to_dict() == said
  return said, body


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
  root = tmp_path_factory.mktemp("theirs")
  folder = checkpoint(root / "hub", "gpt2", "gpt2", eos_token="<|endoftext|>")
  (folder / "README.md").write_text(THEIRS)
  (folder / "LICENSE.txt").write_text("The terms.\n")
  (folder / "LICENSES").mkdir()
  (root / "elsewhere").write_text("of somebody else")
  (folder / "NOTICE").symlink_to(root / "elsewhere")
  return folder


@pytest.fixture(scope="module")
def imported(theirs: Path, mesh: Any) -> Path:
  _, notes = import_run(theirs, theirs.parent / "imported", mesh)
  assert [note for note in notes if "NOTICE" in note and note.endswith(": left out")]
  return theirs.parent / "imported"


def test_a_card_says_what_the_run_knows(trained: Run, tmp_path: Path):
  run = with_corpus(trained, "0.5 tfds:lm1b/en:1.0.0 + 0.5 files:/home/ada/secret/*.md")
  export_run(run, tmp_path / "out", None, MOST)
  said, body = read(tmp_path / "out")
  assert said == {
    "library_name": "transformers",
    "license": "unknown",
    "pipeline_tag": "text-generation",
    "tags": ["flaxlm", "llama"],
    "datasets": ["lm1b"],
  }
  tensors = open_checkpoint(tmp_path / "out").values()
  count = sum(int(np.prod(tensor.shape)) for tensor in tensors)
  assert f"(LlamaForCausalLM): {count:,} parameters" in body
  assert "nobody has said" in body
  for row in (
    "| loss, nats per token | 2.5 |",
    "| perplexity, per token | 12.18 |",
    "| bits per byte | 1.75 |",
    "| data | `tfds:lm1b/en:1.0.0`; `files:*.md` |",
    f"| tokens | {7 * 16 * 64:,} at most",
    "| steps | 7 of ",
  ):
    assert row in body
  assert "after step 7" in body and "model.width = 32" in body
  assert "secret" not in body and str(run.path.parent) not in body
  assert f"{run.tokenizer.vocab_size:,} ids; bpe, made" in body


def test_a_run_without_figures_says_so(trained: Run, tmp_path: Path):
  export_run(trained._replace(path=tmp_path), tmp_path / "out", None, MOST, "mit")
  said, body = read(tmp_path / "out")
  assert said["license"] == "mit" and "datasets" not in said
  assert "## License\n\nmit\n" in body and "None that this run knows." in body


@pytest.mark.parametrize("text", ["Apache 2.0", "", "x", "mit\nb: c", "a" * 99, '"'])
def test_a_license_is_an_identifier(text: str):
  with pytest.raises(ConfigError, match="license is"):
    check_license(text)
  check_license("cc-by-nc-sa-4.0")
  check_license(None)


def test_the_command_names_a_license(in_process: Any, trained: Run):
  done = in_process("export", trained.path, "out", "--license", "The Best")
  assert done.returncode == 2 and "apache-2.0" in done.stderr and not Path("out").exists()
  done = in_process("export", trained.path, "out", "--license", "cc-by-4.0")
  assert done.returncode == 0, done.stderr
  assert read(Path("out"))[0]["license"] == "cc-by-4.0"


def test_an_import_keeps_its_card_and_license(imported: Path, mesh: Any, tmp_path: Path):
  run = load_run(imported, mesh)
  export_run(run, tmp_path / "out", None, MOST)
  assert (tmp_path / "out/README.md").read_text() == THEIRS
  assert (tmp_path / "out/LICENSE.txt").read_text() == "The terms.\n"
  assert not (tmp_path / "out/NOTICE").exists()
  export_run(run, tmp_path / "mine", None, MOST, "mit")
  said, body = read(tmp_path / "mine")
  assert said["license"] == "mit" and "flaxlm has not trained it" in body
  assert "its own is `apache-2.0`" in body and "`README_BASE.md`" in body
  assert (tmp_path / "mine/README_BASE.md").read_text() == THEIRS


def test_what_began_from_an_import_names_no_license_of_its_own(
  imported: Path, mesh: Any, tmp_path: Path
):
  """The terms of its base go along, whatever they mean for it."""
  run = load_run(imported, mesh)
  begun = tmp_path / "begun"
  begun.mkdir()
  shutil.copyfile(imported / TOKENIZER, begun / TOKENIZER)
  write_origin(begun, find_origin(Config(name="x", init=str(imported))))
  export_run(run._replace(path=begun, step=3), tmp_path / "out", None, MOST)
  said, body = read(tmp_path / "out")
  assert said["license"] == "unknown"
  assert "the run `imported` at step 0 (SHA-256 " in body
  assert "its own is `apache-2.0`" in body and str(imported.parent) not in body
  assert (tmp_path / "out/README_BASE.md").read_text() == THEIRS
  assert (tmp_path / "out/LICENSE.txt").exists()
  import_run(tmp_path / "out", tmp_path / "again", mesh)
  again = load_run(tmp_path / "again", mesh)
  export_run(again, tmp_path / "twice", None, MOST, "mit")
  names = {path.name for path in (tmp_path / "twice").glob("README*")}
  assert names == {"README.md", "README_BASE.md", "README_BASE_BASE.md"}
  assert (tmp_path / "twice/README_BASE_BASE.md").read_text() == THEIRS


@pytest.mark.slow
def test_the_card_of_an_adapter_says_what_it_adapts(
  imported: Path, mesh: Any, tmp_path: Path
):
  run = load_run(imported, mesh)
  origin = find_origin(Config(name="x", init=str(imported)))
  lora = LoraConfig(rank=2)
  model = build_model(run.cfg.model, run.cfg.training)
  draw = lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding)
  adapters = jax.tree.map(draw, abstract_adapters(model, lora, mesh))
  save_adapters(tmp_path / "adapted", origin, lora, adapters)
  adapted = load_run(tmp_path / "adapted", mesh)
  export_adapter(adapted, tmp_path / "out", None, "mit")
  said, body = read(tmp_path / "out")
  assert said["library_name"] == "peft" and said["license"] == "mit"
  assert said["tags"] == ["flaxlm", "gpt2", "lora"]
  tensors = read_header(tmp_path / "out" / WEIGHTS).values()
  count = sum(int(np.prod(tensor.shape)) for tensor in tensors)
  assert f"Adapters (LoRA, rank 2) for a `gpt2` (GPT2LMHeadModel): {count:,}" in body
  assert f"the run `imported` at step 0 (SHA-256 {origin.digest[:12]}...)" in body
  assert "--base runs/BASE" in body and "PeftModel" in body
  import_adapter(tmp_path / "out", tmp_path / "again", imported, mesh)
  card = (tmp_path / "out/README.md").read_text()
  export_adapter(load_run(tmp_path / "again", mesh), tmp_path / "twice", None)
  assert (tmp_path / "twice/README.md").read_text() == card, "its own card is kept"
  export_run(load_run(tmp_path / "again", mesh), tmp_path / "merged", None, MOST)
  assert "are merged into the parameters" in read(tmp_path / "merged")[1]


@pytest.mark.slow
def test_a_gguf_file_names_its_license(trained: Run, mesh: Any, tmp_path: Path):
  export_gguf(trained, tmp_path / "model.gguf", None, "cc-by-4.0")
  import_run(tmp_path / "model.gguf", tmp_path / "run", mesh)
  about = json.loads((tmp_path / "run" / IMPORTED_FILES / ABOUT_GGUF).read_text())
  assert about["general.license"] == "cc-by-4.0" and about["general.name"] == "own"
  export_run(load_run(tmp_path / "run", mesh), tmp_path / "out", None, MOST)
  assert read(tmp_path / "out")[0]["license"] == "cc-by-4.0"


@pytest.mark.parametrize(
  ("card", "license"),
  [
    (THEIRS, "apache-2.0"),
    ('---\ntags: [x]\r\nlicense: "mit"\n---\n', "mit"),
    ("# No front matter\nlicense: mit\n", None),
    ("---\nlicense_name: mine\n---\nlicense: mit\n", None),
  ],
)
def test_a_license_is_read_from_front_matter(
  card: str, license: str | None, tmp_path: Path
):
  (tmp_path / "README.md").write_text(card)
  assert said_license(tmp_path) == license
  (tmp_path / ABOUT_GGUF).write_text("[")
  assert said_license(tmp_path) == license
