# SPDX-License-Identifier: Apache-2.0
"""Whole directories: a Hugging Face checkpoint or a GGUF file becomes a run of ours, and
a run becomes a checkpoint.

Besides the weights, a run keeps the tokenizer, the special ids, and the files that only
Hugging Face's libraries read, unchanged in its folder `huggingface/`.
"""

import contextlib
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from jax.sharding import Mesh
from tokenizers import processors

from flaxlm.chat.templates import MORE_TEMPLATES, TEMPLATE, load_templates
from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import OBJECTIVES, DataConfig, ResolvedConfig, TrainingConfig, to_json
from flaxlm.decoding.loading import Run
from flaxlm.decoding.pooling import FILES as POOLING_FILES
from flaxlm.errors import CheckpointError, DataError, first_line
from flaxlm.interop.card import Exported, keep_documents, write_card
from flaxlm.interop.families import FAMILIES
from flaxlm.interop.family import Family
from flaxlm.interop.files import ABOUT_GGUF, check_source, find_gguf, has_file
from flaxlm.interop.gguf_file import GGUF, read_gguf
from flaxlm.interop.gguf_models import read_model
from flaxlm.interop.gguf_tokenizer import read_tokenizer
from flaxlm.interop.huggingface import (
  Loaded,
  describe,
  load_checkpoint,
  load_tensors,
  save_checkpoint,
)
from flaxlm.interop.safetensors import open_checkpoint
from flaxlm.interop.values import Values, read_json
from flaxlm.runs import CHECKPOINTS, CONFIG, IMPORTED_FILES, TOKENIZER, new_files
from flaxlm.tokenizers import Role, load_tokenizer
from flaxlm.tokenizers.imported import SPECIALS, Specials, frame
from flaxlm.tokenizers.own import MAX_FILE_BYTES, load_backend
from flaxlm.tokenizers.sentencepiece import read_sentencepiece

GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
# SentencePiece models whose ids are the checkpoint's: of Llama, Mistral and Gemma; of T5.
SENTENCEPIECE = ("tokenizer.model", "spiece.model")
# Fairseq's models have another order of ids than this file, and no family here is of them.
MOVED_IDS = "sentencepiece.bpe.model"
NUM_SENTINELS = 100  # `<extra_id_0>` and so on, which T5's file does not have
UNREAD = "text cannot be encoded (docs/interop.md)"
# Files that are copied unchanged, by name or pattern.
COPIED = (
  GENERATION,
  TOKENIZER_CONFIG,
  "special_tokens_map.json",
  "added_tokens.json",
  TEMPLATE,
  f"{MORE_TEMPLATES}/*.jinja",
  *POOLING_FILES,
  "vocab.json",
  "merges.txt",
  "vocab.txt",
  *SENTENCEPIECE,
  MOVED_IDS,
)
START = "decoder_start_token_id"
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", START)

Load = Callable[[Mesh, str | None], Loaded]

# -- Import --------------------------------------------------------------------------------


def import_run(
  source: Path, run_dir: Path, mesh: Mesh, dtype: str | None = None
) -> tuple[Loaded, list[str]]:
  """Makes a run directory from `source`, a folder or a GGUF file; also returns notes for
  the user.

  Raises `CheckpointError` (`DataError` for the tokenizer), and then leaves nothing behind.
  """
  notes = []
  with opened(source) as (folder, load), new_folder(run_dir) as partial:
    num_ids = 0
    config = read_json(folder / CONFIG)
    if has_file(folder / TOKENIZER):
      import_tokenizer(folder, partial, config)
    elif models := [folder / name for name in SENTENCEPIECE if has_file(folder / name)]:
      notes += import_sentencepiece(models[0], partial, config)
    elif has_file(folder / MOVED_IDS):
      notes.append(f"{folder / MOVED_IDS} has other ids than the model: {UNREAD}")
    else:
      notes.append(f"{source} has no {TOKENIZER}: {UNREAD}")
    if (partial / TOKENIZER).exists():
      num_ids = load_tokenizer(partial / TOKENIZER).vocab_size
    loaded = load(mesh, dtype)
    notes += [note for note in (loaded.cfg.padding, loaded.note) if note]
    notes += leave_out_unknown(partial / SPECIALS, loaded.cfg.num_ids)
    if num_ids > loaded.cfg.num_ids:
      notes.append(
        f"the tokenizer of {source} has {num_ids:,} ids, the model only "
        f"{loaded.cfg.num_ids:,}: "
        "a text with one of the others is refused"
      )
    store = CheckpointStore(partial / CHECKPOINTS)
    try:
      store.save(0, loaded.params, None, {"step": 0, "corpus": None})
    finally:
      store.close()
    (partial / IMPORTED_FILES).mkdir()
    notes += copy_files((CONFIG, *COPIED), folder, partial / IMPORTED_FILES)
    notes += keep_documents(folder, partial / IMPORTED_FILES)
    with new_files(partial) as written:
      (written / CONFIG).write_text(to_json(run_config(loaded, run_dir)), "utf-8")
  return loaded, notes


@contextlib.contextmanager
def opened(source: Path) -> Iterator[tuple[Path, Load]]:
  """The folder of a checkpoint's small files, and what loads its model.

  For a GGUF file the folder is a temporary one, with all that the file says beside its
  tensors.
  """
  path = find_gguf(source)
  if path is None:
    check_source(source)
    yield source, functools.partial(load_checkpoint, source)
    return
  file = read_gguf(path)
  model = read_model(file)
  with tempfile.TemporaryDirectory(prefix="flaxlm-gguf-") as name:
    folder, words = Path(name), read_tokenizer(file)
    keys = model.keys | (words.ids if words is not None else {})
    write_json(folder / CONFIG, keys)
    write_json(folder / ABOUT_GGUF, about(file))
    if words is not None:
      write_json(folder / GENERATION, words.ids)
      words.backend.save(str(folder / TOKENIZER))
      write_json(folder / TOKENIZER_CONFIG, words.settings)
      for place, text in words.templates.items():
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(text, "utf-8")
    yield folder, functools.partial(load_tensors, keys, str(path), model.tensors)


def about(file: GGUF) -> dict[str, Any]:
  """What a GGUF file says of itself to people: its name, its authors, its licence."""
  return {
    key: value
    for key, value in file.values.items()
    if key.startswith("general.") and isinstance(value, str | int)
  }


def run_config(loaded: Loaded, run_dir: Path) -> ResolvedConfig:
  """The config of an imported run: its model, and a data section that fits it."""
  family = loaded.cfg.family
  return ResolvedConfig(
    name=run_dir.name,
    runs_dir=str(run_dir.parent),
    model=loaded.cfg,
    data=DataConfig(
      objective=OBJECTIVES[family],  # type: ignore[arg-type]
      seq_len=min(loaded.cfg.context, DataConfig().seq_len),
    ),
    training=TrainingConfig(dtype=loaded.dtype, param_dtype=loaded.dtype),  # type: ignore[arg-type]
  )


def import_tokenizer(folder: Path, run_dir: Path, config: dict[str, Any]) -> None:
  """Copies tokenizer.json, and writes the special ids of other files beside it."""
  backend = load_backend(folder / TOKENIZER)
  named = optional(folder, TOKENIZER_CONFIG)
  specials = read_specials(backend, named, numbers(folder, config))
  shutil.copyfile(folder / TOKENIZER, run_dir / TOKENIZER)
  specials.save(run_dir / SPECIALS)


def optional(folder: Path, name: str) -> Values:
  """What a file of settings says, which need not be there."""
  found = read_json(folder / name) if has_file(folder / name) else {}
  return Values(found, str(folder / name))


def numbers(folder: Path, config: dict[str, Any]) -> Values:
  """Where special ids are written as numbers: the settings of generation come first."""
  said = optional(folder, GENERATION)
  return Values(
    config | {k: v for k, v in said.values.items() if v is not None}, said.origin
  )


def import_sentencepiece(path: Path, run_dir: Path, config: dict[str, Any]) -> list[str]:
  """Writes a SentencePiece model as tokenizer.json, with the tokens that the settings add,
  and the special ids beside it; returns notes, if it cannot be read why not.

  As transformers' slow tokenizers do, `bos` is put before a text unless the settings say
  otherwise, and T5's has `eos` after it instead.
  """
  folder = path.parent
  named = optional(folder, TOKENIZER_CONFIG)
  kind = named.values.get("tokenizer_class") or config.get("tokenizer_class")
  is_t5 = str(kind or config.get("model_type")).lower().startswith("t5")
  try:
    backend, own = read_sentencepiece(path)
    add_tokens(backend, named)
    if is_t5 and not named.values.get("added_tokens_decoder"):
      add_sentinels(backend, named)
  except DataError as e:  # Llama 3's is a file of tiktoken
    return [f"{e.cause}: {UNREAD}"]
  # What nothing else says, the model's own names do.
  said: dict[str, Any] = {
    f"{role}_token": backend.id_to_token(n) for role, n in own.items() if n is not None
  }
  said |= {"add_bos_token": not is_t5, "add_eos_token": is_t5}
  said |= {k: v for k, v in named.values.items() if v is not None}
  names = Values(said, named.origin)
  specials = read_specials(backend, names, numbers(folder, config))
  if names.get(bool, "add_eos_token", False):
    specials = specials._replace(suffix=specials.eos_ids[:1])
  backend.save(str(run_dir / TOKENIZER))
  specials.save(run_dir / SPECIALS)
  return []


def add_tokens(backend: tokenizers.Tokenizer, settings: Values) -> None:
  """Adds the tokens that a model has beyond its SentencePiece file, in the order of their
  ids. Raises `DataError` where these do not go on with those of the file."""
  listed = settings.get(dict, "added_tokens_decoder", None) or {}
  ids = {int(n): about for n, about in listed.items() if n.isdecimal()}
  for id_, about in sorted(ids.items()):
    content = about.get("content") if isinstance(about, dict) else None
    if not isinstance(content, str):
      raise DataError(f"{settings.origin}: the added token {id_} has no content")
    token = tokenizers.AddedToken(content, normalized=False)
    (backend.add_special_tokens if about.get("special") else backend.add_tokens)([token])
    if backend.token_to_id(content) != id_:
      raise DataError(f"{settings.origin}: the added token {id_} leaves a gap of ids")


def add_sentinels(backend: tokenizers.Tokenizer, settings: Values) -> None:
  """Adds the tokens that stand for gaps in a text of T5, the first one last."""
  count = settings.get(int, "extra_ids", NUM_SENTINELS)
  if not 0 <= count <= 100 * NUM_SENTINELS:
    raise settings.refused("extra_ids", f"as in {NUM_SENTINELS}")
  names = [f"<extra_id_{number}>" for number in reversed(range(count))]
  backend.add_special_tokens([tokenizers.AddedToken(x, normalized=False) for x in names])


def read_specials(backend: tokenizers.Tokenizer, names: Values, ids: Values) -> Specials:
  """Special ids: from the numbers in the model's files, else from the tokenizer's names."""

  def named(role: str) -> int | None:
    token = names.values.get(f"{role}_token")
    content = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(content) if isinstance(content, str) else None

  def numbered(role: str) -> int | None:
    number = ids.get(int, f"{role}_token_id", None)
    return named(role) if number is None or number < 0 else number

  ends = ids.values.get("eos_token_id")
  if not isinstance(ends, list):
    end = numbered("eos")
    ends = [] if end is None else [end]
  if not all(type(end) is int and 0 <= end < 2**31 for end in ends):
    raise ids.refused("eos_token_id", "it must be an id or a list of ids")
  bos = numbered("bos")
  if ids.values.get("is_encoder_decoder") is True:
    bos = ids.get(int, START, numbered("pad"))  # T5's decoder starts with the padding id
  prefix, suffix = frame(backend)
  if names.get(bool, "add_bos_token", False) and bos is not None and bos not in prefix:
    prefix = (bos, *prefix)
  masks = (backend.token_to_id(name) for name in ("[MASK]", "<mask>"))
  mask = next((mask for mask in (named("mask"), *masks) if mask is not None), None)
  return Specials(bos, tuple(ends), numbered("pad"), mask, prefix, suffix)


def leave_out_unknown(path: Path, num_ids: int) -> list[str]:
  """Takes ids from `num_ids` on out of stored special ids; returns what to tell about it.

  transformers keeps them, and then never ends a completion, or reads another embedding.
  """
  if not path.exists():  # no tokenizer came along
    return []
  said = Specials.load(path)
  known = lambda number: None if number is None or number >= num_ids else number
  ends = tuple(end for end in said.eos_ids if end < num_ids)
  kept = said._replace(bos_id=known(said.bos_id), eos_ids=ends, pad_id=known(said.pad_id))
  if kept == said:
    return []
  kept.save(path)
  lost = [i for i in (said.bos_id, *said.eos_ids, said.pad_id) if i != known(i)]
  ids = ", ".join(f"{number:,}" for number in dict.fromkeys(lost))
  note = f"special ids that the model lacks, which has {num_ids:,}, are left out: {ids}"
  if said.eos_ids and not ends:
    note += "; nothing ends a completion but its length"
  return [note]


# -- Export --------------------------------------------------------------------------------


def export_run(
  run: Run, folder: Path, dtype: str | None, most: int, license: str | None = None
) -> Family:
  """Writes a run so that `from_pretrained(folder)` opens it; returns its family.

  `dtype` None is that of the parameters; a file has at most `most` bytes; the model card
  names the `license`. Raises `CheckpointError` if no Hugging Face family can express the
  model.
  """
  kept, origin = run.path / IMPORTED_FILES, imported_config(run)
  family = family_of(run)
  cfg = run.cfg.model
  with new_folder(folder) as partial:
    dtype = dtype or run.cfg.training.param_dtype
    keys = save_checkpoint(partial, cfg, run.params, family, dtype, most)
    if origin:
      ids = {key: origin.get(key) for key in TOKEN_KEYS}
      copy_files(COPIED, kept, partial)
      copy_files((TOKENIZER,), run.path, partial)
    else:
      ids = export_tokenizer(run, partial)
    if cfg.family == "encoder_decoder" and ids.get(START) is None:
      ids[START] = ids.get("pad_token_id") or 0  # as T5 does
    ids = {key: value for key, value in ids.items() if value is not None}
    # Unknown ids are written as null: the defaults of some classes are out of range.
    write_json(partial / CONFIG, dict.fromkeys(TOKEN_KEYS[:3]) | ids | keys)
    if not (partial / GENERATION).exists() and cfg.family != "encoder":
      write_json(partial / GENERATION, ids)
    tensors = open_checkpoint(partial).values()
    count = sum(math.prod(tensor.shape) for tensor in tensors)
    exported = Exported(family.model_type, keys["architectures"][0], count)
    write_card(partial, run, exported, license)
  return family


def imported_config(run: Run) -> dict[str, Any]:
  """The config.json that the run came with; {} for one that was not imported."""
  path = run.path / IMPORTED_FILES / CONFIG
  return read_json(path) if has_file(path) else {}


def family_of(run: Run) -> Family:
  """The family that the run came from or, if it was not imported, one that can express it.

  Raises `CheckpointError` if none can.
  """
  imported_from = imported_config(run).get("model_type")
  candidates = [family for family in FAMILIES.values() if family.inner is None]
  candidates.sort(key=lambda family: family.model_type != imported_from)
  return find_fitting(run, candidates)


def find_fitting(run: Run, families: Iterable[Family]) -> Family:
  """The first of `families` that can express the run's model.

  Raises `CheckpointError` with the shortest list of obstacles.
  """
  refusals: list[CheckpointError] = []
  for family in families:
    try:
      describe(run.cfg.model, run.params, family)
      return family
    except CheckpointError as e:
      refusals.append(e)
  raise min(refusals, key=lambda e: len(e.cause))


def export_tokenizer(run: Run, folder: Path) -> dict[str, Any]:
  """Writes the tokenizer of a run that was trained here for Hugging Face's library, which
  then adds the special tokens that the model was trained with. Returns the special ids."""
  tokenizer = run.tokenizer
  (folder / TOKENIZER).write_text(tokenizer.to_json(), "utf-8")
  backend = load_backend(folder / TOKENIZER)
  start, end = map(backend.id_to_token, (tokenizer.bos_id, tokenizer.eos_id))
  reads = run.cfg.model.family == "encoder_decoder"
  text = -1  # no token's id
  roles: dict[str, Role] = {"encoder_decoder": "source", "encoder": "text"}
  framed = tokenizer.framed([text], roles.get(run.cfg.model.family, "prompt"))
  names = ["$A" if id_ == text else backend.id_to_token(id_) for id_ in framed]
  backend.post_processor = processors.TemplateProcessing(
    single=names, special_tokens=[(backend.id_to_token(i), i) for i in {*framed} - {text}]
  )
  (folder / TOKENIZER).write_text(backend.to_str(pretty=True), "utf-8")
  keys: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": start,
    "eos_token": end,
    "pad_token": end,
    "model_max_length": run.cfg.model.context,
    "clean_up_tokenization_spaces": False,
  }
  if templates := load_templates(run.path):
    named = [{"name": name, "template": text} for name, text in templates.items()]
    keys["chat_template"] = named if len(named) > 1 else named[0]["template"]
  if tokenizer.mask_id is not None:
    keys["mask_token"] = backend.id_to_token(tokenizer.mask_id)
  write_json(folder / TOKENIZER_CONFIG, keys)
  ids = dict.fromkeys(TOKEN_KEYS[: 4 if reads else 3], tokenizer.eos_id)
  return ids | {key: tokenizer.bos_id for key in ids if key in (TOKEN_KEYS[0], START)}


# -- Files ---------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """A temporary folder beside `path`, which is renamed to `path` if all goes well.

  Raises `CheckpointError` if `path` exists already, and is not an empty folder.
  """
  try:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
      raise CheckpointError(f"{path} exists already", "choose another name, or remove it")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
  except OSError as e:
    raise CheckpointError(f"{path} cannot be written: {first_line(e)}") from e
  try:
    yield partial
    partial.chmod(0o755)
    if path.exists():
      path.rmdir()
    partial.rename(path)
  except OSError as e:
    raise CheckpointError(f"{path} cannot be written: {first_line(e)}") from e
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def files_named(folder: Path, pattern: str) -> list[Path]:
  """What a pattern names, links to nothing too, which `glob` would pass over."""
  return sorted(folder.glob(pattern)) if "*" in pattern else [folder / pattern]


def copy_files(patterns: Iterable[str], source: Path, target: Path) -> list[str]:
  """Copies those files of a folder that exist; names those of an absurd size, left out.

  Raises `CheckpointError` for a link that leads out of the folder.
  """
  notes = []
  for path in (path for pattern in patterns for path in files_named(source, pattern)):
    if not has_file(path, source):
      continue
    if path.stat().st_size > MAX_FILE_BYTES:
      notes.append(f"{path} is larger than {MAX_FILE_BYTES >> 20} MB: left out")
      continue
    copy = target / path.relative_to(source)
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, copy)
  return notes


def write_json(path: Path, values: dict[str, Any]) -> None:
  text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
  path.write_text(f"{text}\n", "utf-8")
