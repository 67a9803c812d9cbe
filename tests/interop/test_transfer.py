# SPDX-License-Identifier: Apache-2.0
"""Whole directories: import makes a run that generates, export one that others open."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_tokenizers
from conftest import ROOT, tiny, with_transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from test_huggingface import random_params, rewrite, save

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import Config, DataConfig, ModelConfig, to_json
from flaxlm.decoding.completions import complete
from flaxlm.decoding.encoding import embed_texts, encode_rows, fill_masks
from flaxlm.decoding.loading import load_run
from flaxlm.decoding.sampling import same_settings
from flaxlm.errors import CheckpointError, ConfigError, DataError
from flaxlm.interop.families import FAMILIES
from flaxlm.interop.safetensors import INDEX, open_checkpoint, write_files
from flaxlm.interop.transfer import export_run, import_run, write_json
from flaxlm.look.pieces import Reading
from flaxlm.look.tokens import look_tokens
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import ImportedTokenizer, Specials, load_tokenizer, train_tokenizer
from flaxlm.tokenizers.own import load_backend
from flaxlm.tokenizers.sentencepiece import read_sentencepiece
from flaxlm.training.evaluation import evaluate_run
from tests.tokenizers.test_sentencepiece import BYTES, LETTERS, MERGED, START, TINY

MOST = 10**9


def checkpoint(folder: Path, variant: str, kind: str, **said: Any) -> Path:
  """A checkpoint as it comes from a hub: weights, config and tokenizer."""
  folder.mkdir()
  save(folder, variant)
  tokenizer = getattr(tiny_tokenizers, kind)()
  config = json.loads((folder / "config.json").read_text())
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(said))
  (folder / "config.json").write_text(json.dumps(config | said.pop("ids", {})))
  return folder


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
  return make_mesh({"data": -1})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, mesh: Any) -> Path:
  """A GPT-2 whose tokenizer has more ids than the model: 67 of 301."""
  root = tmp_path_factory.mktemp("transfer")
  ids = {"bos_token_id": 66, "eos_token_id": 66}
  source = checkpoint(root / "hub", "gpt2", "gpt2", eos_token="<|endoftext|>", ids=ids)
  (source / "generation_config.json").write_text('{"eos_token_id": [66, 65]}')
  import_run(source, root / "run", mesh)
  return root / "run"


@pytest.mark.slow
def test_an_imported_run_infers(run_dir: Path, mesh: Any):
  run = load_run(run_dir, mesh)
  assert run.step == 0 and run.tokenizer.eos_ids == {65, 66}
  prompt = "".join(run.tokenizer.decode([i]) for i in (40, 50, 60))
  [answer] = complete(run, [prompt], same_settings(1, temperature=0), 20)
  assert answer.tokens and max(answer.tokens) < 67
  assert not set(answer.tokens[:-1]) & {65, 66}
  assert answer.completion == run.tokenizer.decode(
    [i for i in answer.tokens if i not in (65, 66)]
  )


def test_what_goes_in_comes_out_again(run_dir: Path, mesh: Any, tmp_path: Path):
  source, out = run_dir.parent / "hub", tmp_path / "out"
  family = export_run(load_run(run_dir, mesh), out, None, 20_000)
  assert family.model_type == "gpt2" and (out / INDEX).exists()
  found, given = open_checkpoint(out), open_checkpoint(source)
  assert found.keys() == given.keys()
  for name, tensor in given.items():
    np.testing.assert_array_equal(found[name].read(), tensor.read())
  for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    assert (out / name).read_bytes() == (source / name).read_bytes()
  config = json.loads((out / "config.json").read_text())
  assert (config["bos_token_id"], config["pad_token_id"]) == (66, None)
  assert config["architectures"] == ["GPT2LMHeadModel"]


def test_nothing_is_overwritten_and_nothing_is_left_behind(
  run_dir: Path, mesh: Any, tmp_path: Path
):
  source = run_dir.parent / "hub"
  with pytest.raises(CheckpointError, match="exists already"):
    import_run(source, run_dir, mesh)
  with pytest.raises(CheckpointError, match="exists already"):
    export_run(load_run(run_dir, mesh), source, None, MOST)
  broken = tmp_path / "broken"
  broken.mkdir()
  (broken / "config.json").write_text((source / "config.json").read_text())
  (broken / "tokenizer.json").write_text("{}")
  with pytest.raises(DataError):
    import_run(broken, tmp_path / "run", mesh)
  (broken / "tokenizer.json").unlink()
  with pytest.raises(CheckpointError, match="neither"):
    import_run(broken, tmp_path / "run", mesh)
  assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_without_a_tokenizer_the_user_is_told(mesh: Any, tmp_path: Path):
  (tmp_path / "hub").mkdir()
  save(tmp_path / "hub", "llama_3")
  _, notes = import_run(tmp_path / "hub", tmp_path / "run", mesh)
  assert "no tokenizer.json" in notes[0]
  with pytest.raises(DataError, match=r"tokenizer\.json"):
    load_run(tmp_path / "run", mesh)
  run = load_run(tmp_path / "run", mesh, needs_text=False)
  export_run(run, tmp_path / "out", None, MOST)
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert {config[f"{role}_token_id"] for role in ("bos", "eos", "pad")} == {None}


def test_a_sentencepiece_model_becomes_the_tokenizer(mesh: Any, tmp_path: Path):
  """With the tokens that the settings add, and what they say of the frame of a text."""
  hub = tmp_path / "hub"
  hub.mkdir()
  save(hub, "llama_3")
  (hub / "tokenizer.model").write_bytes(TINY)
  size = len(START) + len(BYTES) + len(LETTERS) + len(MERGED)
  added = {str(size): {"content": "<|user|>", "special": True}}
  settings = {"added_tokens_decoder": added, "eos_token": "<|user|>"}
  (hub / "tokenizer_config.json").write_text(json.dumps(settings))
  _, notes = import_run(hub, tmp_path / "run", mesh)
  assert not any("no tokenizer.json" in note for note in notes)
  tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
  wanted, _ = read_sentencepiece(hub / "tokenizer.model")
  assert list(tokenizer.encode("the cab\n")) == wanted.encode("the cab\n").ids
  assert tokenizer.framed([7], "prompt") == [1, 7]  # as transformers' LlamaTokenizer
  assert list(tokenizer.encode("<|user|>"))[-1] == size == tokenizer.vocab_size - 1

  for change, note in (
    ({"added_tokens_decoder": {str(size + 1): added[str(size)]}}, "leaves a gap of ids"),
    ({}, "is not a SentencePiece model"),
  ):
    (hub / "tokenizer_config.json").write_text(json.dumps(change))
    if not change:
      (hub / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    _, notes = import_run(hub, tmp_path / f"no {note}", mesh)
    assert note in notes[0] and "text cannot be encoded" in notes[0]


def test_a_sentencepiece_model_of_t5(mesh: Any, tmp_path: Path):
  """It has another name, another frame, and tokens for gaps that the file has not."""
  hub = tmp_path / "hub"
  hub.mkdir()
  save(hub, "t5")
  (hub / "spiece.model").write_bytes(TINY)
  size = len(START) + len(BYTES) + len(LETTERS) + len(MERGED)
  import_run(hub, tmp_path / "run", mesh)
  tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
  assert tokenizer.framed([7], "source") == [7, tokenizer.eos_id]
  assert list(tokenizer.encode("<extra_id_0>"))[-1] == size + 99
  assert list(tokenizer.encode("<extra_id_99>"))[-1] == size
  assert tokenizer.vocab_size == size + 100

  said = {"extra_ids": 0, "add_bos_token": None}
  (hub / "tokenizer_config.json").write_text(json.dumps(said))
  import_run(hub, tmp_path / "none", mesh)
  tokenizer = load_tokenizer(tmp_path / "none" / "tokenizer.json")
  assert tokenizer.vocab_size == size
  (hub / "tokenizer_config.json").write_text('{"extra_ids": -1}')
  with pytest.raises(CheckpointError, match="extra_ids is -1"):
    import_run(hub, tmp_path / "refused", mesh)

  (hub / "spiece.model").rename(hub / "sentencepiece.bpe.model")
  _, notes = import_run(hub, tmp_path / "moved", mesh)
  assert "sentencepiece.bpe.model has other ids than the model" in notes[0]


@with_transformers
def test_a_folder_of_t5_has_the_ids_of_transformers(mesh: Any, tmp_path: Path):
  """With what its tokenizer adds to the file: the end of a text, and tokens for gaps."""
  sentencepiece = pytest.importorskip("sentencepiece")
  from transformers import AutoTokenizer

  written, hub = io.BytesIO(), tmp_path / "hub"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat sat on a mat", "a hat: the theatre, the bees"] * 30),
    model_writer=written,
    vocab_size=60,
    hard_vocab_limit=False,
    minloglevel=3,
    **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
  )
  hub.mkdir()
  save(hub, "t5")
  (hub / "spiece.model").write_bytes(written.getvalue())
  (hub / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
  import_run(hub, tmp_path / "run", mesh)
  ours = load_tokenizer(tmp_path / "run" / "tokenizer.json")
  theirs = AutoTokenizer.from_pretrained(str(hub))
  assert ours.vocab_size == len(theirs)
  for text in ("the cat, a hat", "  two  bees!", "a <extra_id_0> sat <extra_id_99>."):
    assert ours.framed(ours.encode(text), "source") == theirs(text).input_ids


@pytest.mark.slow
def test_an_imported_encoder_fills_masks_and_embeds(mesh: Any, tmp_path: Path):
  source = checkpoint(tmp_path / "hub", "bert", "bert", mask_token="[MASK]")
  import_run(source, tmp_path / "run", mesh)
  run = load_run(tmp_path / "run", mesh)
  [filled] = fill_masks(run, ["the [MASK] sat"])
  assert filled.filled.startswith("the ") and len(filled.candidates[0]) == 5
  (mean_D,) = embed_texts(run, ["the cat"])
  (row,) = encode_rows(run, ["the cat"])
  hidden = jax.jit(lambda params, x: run.model.apply(params, x, method="hidden").value[0])
  hidden_TD = hidden({"params": run.params}, np.array([row]))
  np.testing.assert_allclose(mean_D, hidden_TD.mean(0), atol=1e-5)


def without_head(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {name: array for name, array in arrays.items() if not name.startswith("cls.")}


@pytest.mark.slow
def test_a_sentence_encoder_embeds_and_fills_nothing(
  mesh: Any, in_process: Any, tmp_path: Path
):
  """It has no head, its tokenizer pads and cuts, and its files say how vectors are made."""
  source = checkpoint(tmp_path / "hub", "bert", "bert", mask_token="[MASK]")
  rewrite(source, without_head)
  backend = tiny_tokenizers.bert()
  backend.enable_padding(length=12)
  backend.enable_truncation(6)
  backend.save(str(source / "tokenizer.json"))
  kinds = ("Transformer", "Pooling", "Normalize")
  paths = ("", "1_Pooling", "2_Normalize")
  modules = [{"type": f"x.{k}", "path": p} for k, p in zip(kinds, paths, strict=True)]
  (source / "modules.json").write_text(json.dumps(modules))
  (source / "1_Pooling").mkdir()
  (source / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
  (source / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
  import_run(source, tmp_path / "run", mesh)
  run, told = load_run(tmp_path / "run", mesh), []

  texts = ["the cat", "the cat sat on the mat, a hat, the cats that sat there"]
  vectors = embed_texts(run, texts, warn=told.append)
  assert "first 8 tokens" in told[0] and told[0].endswith(": 1")
  for text, vector_D in zip(texts, vectors, strict=True):
    ids = tiny_tokenizers.bert().encode(text).ids
    ids = ids if len(ids) <= 8 else [*ids[:7], ids[-1]]
    hidden_TD = run.model.apply({"params": run.params}, np.array([ids]), method="hidden")
    cls_D = np.asarray(hidden_TD.value[0, 0])
    np.testing.assert_allclose(vector_D, cls_D / np.linalg.norm(cls_D), atol=1e-5)

  reading = Reading([2, 3], None, [])
  for guess in (
    lambda: fill_masks(run, ["the [MASK] sat"]),
    lambda: look_tokens(run, reading, 9),
    lambda: evaluate_run(run, "stdlib", "validation", 1, told.append),
  ):
    with pytest.raises(ConfigError, match="without a masked-LM head"):
      guess()

  exported = in_process("export", tmp_path / "run", tmp_path / "out")
  assert "out: bert (BertModel)" in exported.stdout, exported.stderr
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert config["architectures"] == ["BertModel"]
  for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.slow
def test_an_imported_encoder_decoder_answers(mesh: Any, tmp_path: Path):
  ids = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
  source = checkpoint(tmp_path / "hub", "t5", "t5", ids=ids)
  import_run(source, tmp_path / "run", mesh)
  run = load_run(tmp_path / "run", mesh)
  [answer] = complete(run, ["the cat"], same_settings(1, temperature=0), 1)
  assert len(answer.tokens) == 1


# -- Runs of our own -----------------------------------------------------------------------


def own_run(folder: Path, model: ModelConfig, tokenizer: Any = None) -> Path:
  """A run as training leaves it, with random parameters."""
  tokenizer = tokenizer or train_tokenizer("byte", [], 257)
  cfg = Config(
    name="own",
    runs_dir=str(folder),
    model=model.resolve(tokenizer.vocab_size),
    data=DataConfig(seq_len=min(model.context, 256)),
  )
  cfg.run_dir.mkdir()
  tokenizer.save(cfg.run_dir / "tokenizer.json")
  (cfg.run_dir / "config.json").write_text(to_json(cfg))
  params = unflatten_dict(random_params(cfg.model), sep="/")
  store = CheckpointStore(cfg.run_dir / "checkpoints")
  store.save(7, jax.tree.map(jax.numpy.asarray, params), None, {"step": 7})
  store.close()
  return cfg.run_dir


@pytest.mark.slow
def test_a_run_of_ours_becomes_the_family_that_it_is(mesh: Any, tmp_path: Path):
  run = load_run(own_run(tmp_path, ModelConfig(width=32, depth=2, context=64)), mesh)
  assert export_run(run, tmp_path / "out", None, MOST).model_type == "llama"
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert (config["vocab_size"], config["eos_token_id"]) == (257, 256)
  backend = load_backend(tmp_path / "out/tokenizer.json")
  prompt = run.tokenizer.framed(run.tokenizer.encode("def "), "prompt")
  assert backend.encode("def ").ids == prompt
  import_run(tmp_path / "out", tmp_path / "again", mesh)
  again = load_run(tmp_path / "again", mesh)
  real = lambda mine, other: mine[tuple(map(slice, other.shape))]  # padding stays here
  params = jax.tree.map(real, run.params, again.params)
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  assert run.params["embedding"]["table"].shape == (320, 32)
  settings = same_settings(1, temperature=0)
  [mine], [other] = (complete(r, ["def "], settings, 1) for r in (run, again))
  assert (mine.tokens, mine.completion) == (other.tokens, other.completion)


def test_the_tokenizer_of_others_goes_with_a_run_of_ours(mesh: Any, tmp_path: Path):
  """Trained with --tokenizer.path: what it adds to a text is what the model has learnt."""
  specials = Specials(bos_id=1, eos_ids=(2,), prefix=(1,))
  tokenizer = ImportedTokenizer(tiny_tokenizers.llama(), specials)
  model = ModelConfig(width=32, depth=2, context=64)
  run = load_run(own_run(tmp_path, model, tokenizer), mesh)
  export_run(run, tmp_path / "out", None, MOST)
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
  backend = load_backend(tmp_path / "out/tokenizer.json")
  assert backend.encode("the cat").ids == [1, *tokenizer.encode("the cat")]


def test_a_model_that_no_family_is_is_refused(mesh: Any, tmp_path: Path):
  model = ModelConfig(width=32, depth=2, context=64, learned_sinks=True)
  run = load_run(own_run(tmp_path, model), mesh)
  with pytest.raises(CheckpointError, match="no place for"):
    export_run(run, tmp_path / "out", None, MOST)
  assert not (tmp_path / "out").exists()


# -- Commands ------------------------------------------------------------------------------


def test_the_commands(in_process: Any, run_dir: Path, tmp_path: Path):
  source = run_dir.parent / "hub"
  done = in_process("import", source, tmp_path / "runs/mine")
  assert done.returncode == 0, done.stderr
  assert "gpt2" in done.stdout and "float32" in done.stdout
  done = in_process(
    "export", "mine", tmp_path / "out", "--shard-size=20KB", "--dtype=bfloat16"
  )
  assert done.returncode == 0, done.stderr
  assert {t.dtype for t in open_checkpoint(tmp_path / "out").values()} == {"BF16"}
  assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
  done = in_process("import", tmp_path / "nowhere", tmp_path / "x")
  assert done.returncode == 4 and "nowhere" in done.stderr
  done = in_process("export", "mine", tmp_path / "y", "--shard-size=lots")
  assert done.returncode == 2 and "shard-size" in done.stderr


@pytest.mark.parametrize("resume", ["auto", "must", "never"])
def test_training_does_not_begin_in_the_place_of_an_imported_run(
  resume: str, in_process: Any, corpus: str, run_dir: Path
):
  state = lambda: {p: p.read_bytes() for p in run_dir.rglob("[!.]*") if p.is_file()}
  before = state()
  names = [f"--name={run_dir.name}", f"--runs-dir={run_dir.parent}"]
  done = in_process("train", *tiny(corpus), *names, f"--checkpoint.resume={resume}")
  assert done.returncode == 4, done.stderr
  assert "not trained here" in done.stderr and "--name" in done.stderr
  assert state() == before


def test_training_does_not_begin_in_the_folder_of_a_hub(
  in_process: Any, corpus: str, run_dir: Path
):
  source = run_dir.parent / "hub"
  before = (source / "config.json").read_bytes()
  names = ["--name=hub", f"--runs-dir={run_dir.parent}"]
  done = in_process("train", *tiny(corpus), *names)
  assert done.returncode == 4 and "not trained here" in done.stderr
  assert (source / "config.json").read_bytes() == before


# -- Memory --------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from flaxlm.interop.huggingface import load_checkpoint
from flaxlm.sharding import make_mesh

mesh = make_mesh({"data": -1})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_checkpoint(Path(sys.argv[1]), mesh)
before = peak()
params = load_checkpoint(Path(sys.argv[2]), mesh).params
print(1024 * (peak() - before), sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_the_host_holds_one_tensor_at_a_time(tmp_path: Path):
  """On CPUs the devices' memory is the host's: parameters, and little more than one
  tensor on top. A model read whole before it is placed would take twice its size."""
  for name, depth in (("small", 1), ("large", 16)):
    folder = tmp_path / name
    folder.mkdir()
    cfg = ModelConfig(width=256, depth=depth, vocab_size=4096, context=64).resolve()
    family = FAMILIES["llama"]
    abstract = abstract_params(build_model(cfg), make_mesh({"data": -1}))
    flat = flatten_dict(abstract, sep="/")
    expected = family.expected(cfg, {path: x.shape for path, x in flat.items()})
    shapes = {name: shape for name, (_, _, shape) in expected.items()}
    zeros = lambda name, shapes=shapes: np.zeros(shapes[name], np.float32)
    write_files(folder, shapes, np.dtype(np.float32), MOST, zeros)
    write_json(folder / "config.json", family.keys(cfg, tuple(expected)))
  arguments = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"]
  done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=120)
  assert done.returncode == 0, done.stderr
  rise, size = map(int, done.stdout.split())
  largest = max(4 * math.prod(shape) for shape in shapes.values())
  assert size > 10 * largest
  assert rise < size + 3 * largest, f"{rise / 1e6:.0f} MB for {size / 1e6:.0f} MB"
