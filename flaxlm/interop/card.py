# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: README.md, which says what a run knows of itself.

Nothing in it is guessed, and paths of this machine stay out of it. What came with an import
(its card, its licence) goes along.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from flaxlm.config import Config, ModelConfig, difference
from flaxlm.data.mixtures import parse_mixture
from flaxlm.decoding.loading import Run
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.interop.files import ABOUT_GGUF, CARD, DOCUMENTS, has_file
from flaxlm.origin import Origin, read_origin
from flaxlm.runs import IMPORTED_FILES, METRICS, lines_of
from flaxlm.tokenizers.own import MAX_FILE_BYTES
from flaxlm.version import __version__

ADAPTER_DOCUMENTS = "adapter"  # in the folder of what was imported
UNKNOWN = "unknown"  # the hub's own word for it
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{1,40}")
PIPELINES = {"decoder": "text-generation", "encoder": "fill-mask"}
# The class of transformers that opens an architecture, by how its name ends.
CLASSES = {
  "ForMaskedLM": "AutoModelForMaskedLM",
  "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
  "ForCausalLM": "AutoModelForCausalLM",
  "LMHeadModel": "AutoModelForCausalLM",
}
LOADS = "eval/expert_load/"  # figures of each expert: too many for a card
FIGURES = {
  "eval/loss": "loss, nats per token",
  "eval/perplexity": "perplexity, per token",
  "eval/bits_per_byte": "bits per byte",
  "eval/gzip_bits_per_byte": "bits per byte of `gzip -9`, for comparison",
}
# Sections of the config without anything that is only of this machine.
SECTIONS = ("model", "optimizer", "training", "lora", "dpo")


@dataclasses.dataclass(frozen=True)
class Exported:
  """What was written besides the card."""

  model_type: str
  architecture: str  # the class in transformers
  num_parameters: int  # of all tensors in the files
  is_adapter: bool = False

  @property
  def auto_class(self) -> str:
    ends = (auto for end, auto in CLASSES.items() if self.architecture.endswith(end))
    return next(ends, "AutoModel")


def check_license(license: str | None) -> None:
  """Raises `ConfigError` for what cannot be an identifier of a licence on the hub."""
  if license is not None and not LICENSE.fullmatch(license):
    raise ConfigError(
      f"license is {license!r}",
      "as the Hugging Face hub calls it: apache-2.0, mit, cc-by-4.0, other, ...",
    )


# -- What came along -----------------------------------------------------------------------


def keep_documents(source: Path, target: Path) -> list[str]:
  """Copies what a checkpoint says of itself to people; returns notes on what it does not.

  None of it is needed: a link that leads out of the folder is no reason to refuse it.
  """
  notes = []
  for path in (path for pattern in DOCUMENTS for path in sorted(source.glob(pattern))):
    if path.is_dir():
      continue
    try:
      has_file(path, source)
    except CheckpointError as e:
      notes.append(f"{e.cause}: left out")
      continue
    if path.stat().st_size > MAX_FILE_BYTES:
      notes.append(f"{path} is larger than {MAX_FILE_BYTES >> 20} MB: left out")
      continue
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target / path.name)
  return notes


def documents_of(run: Run, is_adapter: bool) -> Path:
  """The folder of what came with the run or, of adapters that were imported, with these."""
  kept = run.path / IMPORTED_FILES
  own = kept / ADAPTER_DOCUMENTS
  return own if is_adapter and own.is_dir() else kept


def is_as_imported(run: Run, is_adapter: bool = False) -> bool:
  """Whether nothing has trained what was imported; an adapter has a base all the same."""
  documents = documents_of(run, is_adapter)
  if run.step or not documents.is_dir():
    return False
  return documents.name == ADAPTER_DOCUMENTS or read_origin(run.path) is None


def license_of(run: Run, is_adapter: bool = False) -> str | None:
  """The licence that came with what is exported as it was imported; else None."""
  if not is_as_imported(run, is_adapter):
    return None
  return said_license(documents_of(run, is_adapter))


def said_license(folder: Path) -> str | None:
  """The licence that a card's front matter names, or a GGUF file; None if neither does."""
  if (folder / CARD).is_file():
    text = (folder / CARD).read_text("utf-8", "replace")
    front = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    pattern = r"^license:[ \t]*[\"']?([a-z0-9.-]+)"
    if front and (line := re.search(pattern, front[1], re.MULTILINE)):
      return line[1]
  with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
    said = json.loads((folder / ABOUT_GGUF).read_text("utf-8")).get("general.license")
    return said if isinstance(said, str) and LICENSE.fullmatch(said) else None
  return None


# -- The card ------------------------------------------------------------------------------


def write_card(folder: Path, run: Run, exported: Exported, license: str | None) -> None:
  """Writes the card of what is in `folder`, and what came with the import beside it.

  The card of an import that nothing has trained stays as it is, unless a `license` is
  given; the card of what a run began from becomes README_BASE.md.
  """
  is_adapter = exported.is_adapter
  kept = documents_of(run, is_adapter)
  keep_documents(kept, folder)
  if is_as_imported(run, is_adapter) and license is None and (folder / CARD).exists():
    return
  for path in sorted(folder.glob("README*.md"), reverse=True):  # the longest name first
    path.rename(path.with_name(path.name.replace("README", "README_BASE", 1)))
  license = license or license_of(run, is_adapter)
  texts = (
    *front_matter(run, exported, license),
    *about(run, exported),
    *about_license(folder, license, said_license(kept)),
    *use(run, exported),
    *training(run),
    *evaluation(run),
    *tokenizer(run),
    *config(run),
  )
  (folder / CARD).write_text("\n".join(texts) + "\n", "utf-8")


def front_matter(run: Run, exported: Exported, license: str | None) -> Iterator[str]:
  """What the hub reads, in YAML. Strings of others are quoted as JSON is, which YAML
  takes."""
  yield "---"
  yield f"library_name: {'peft' if exported.is_adapter else 'transformers'}"
  yield f"license: {json.dumps(license or UNKNOWN)}"
  pipeline = PIPELINES.get(run.cfg.model.family)
  if exported.auto_class == "AutoModel":
    pipeline = "feature-extraction"
  if pipeline is not None:
    yield f"pipeline_tag: {pipeline}"
  yield "tags:"
  yield from (f"- {tag}" for tag in ("flaxlm", exported.model_type))
  if exported.is_adapter:
    yield "- lora"
  names = [name for name in corpora(run.cfg) if name.startswith("tfds:")]
  if names and run.step:
    yield "datasets:"
    yield from (f"- {json.dumps(re.split('[:/]', name)[1])}" for name in names)
  yield "---"


def about(run: Run, exported: Exported) -> Iterator[str]:
  origin, lora = read_origin(run.path), run.cfg.lora
  what = f"`{exported.model_type}` ({exported.architecture})"
  count = f"{exported.num_parameters:,} parameters"
  yield f"\n# {plain(run.cfg.name or run.path.name)}\n"
  if exported.is_adapter:
    yield f"Adapters (LoRA, rank {lora.rank}) for a {what}: {count}."
  else:
    yield f"A {what}: {count}."
  if origin is None:
    begun = "random parameters" if run.step else "the checkpoint of others that it is"
    yield f"Begun from {begun}; written by flaxlm {__version__}."
    return
  yield f"Begun from {base(origin)}; written by flaxlm {__version__}."
  if lora.rank and not exported.is_adapter:
    yield f"Its adapters (LoRA, rank {lora.rank}) are merged into the parameters."
  if exported.is_adapter:
    yield "They are of use only over that base, whose parameters are not here."


def base(origin: Origin) -> str:
  """What a run began from: the name of its folder, without the path to it."""
  digest = origin.digest[:12]
  return f"the run {code(origin.path.name)} at step {origin.step} (SHA-256 {digest}...)"


def about_license(folder: Path, license: str | None, of_base: str | None) -> Iterator[str]:
  yield "\n## License\n"
  yield license or "Unknown: nobody has said under which license this may be used."
  files = [path.name for pattern in DOCUMENTS for path in sorted(folder.glob(pattern))]
  if of_base and of_base != license:
    yield f"\nWhat it began from says that its own is {code(of_base)}."
  if files:
    yield f"\nCame with what it began from: {', '.join(map(code, files))}."


def use(run: Run, exported: Exported) -> Iterator[str]:
  """How to open the folder, with transformers (and PEFT) and with flaxlm."""
  auto, name = exported.auto_class, re.sub(r"[^\w.-]", "_", run.cfg.name or run.path.name)
  yield "\n## Use\n\nIn this folder:\n\n```python"
  if exported.is_adapter:
    yield f"from peft import PeftModel\nfrom transformers import {auto}\n"
    yield f'base = {auto}.from_pretrained("BASE")  # what it began from, see above'
    yield 'model = PeftModel.from_pretrained(base, ".")\n```'
    load = f"flaxlm import . runs/{name} --base runs/BASE"
  else:
    yield f"from transformers import AutoTokenizer, {auto}\n"
    if run.tokenizer is not None:
      yield 'tokenizer = AutoTokenizer.from_pretrained(".")'
    yield f'model = {auto}.from_pretrained(".")\n```'
    load = f"flaxlm import . runs/{name}"
  yield f"\n```sh\n{load}"
  if auto == "AutoModel":
    yield f'flaxlm embed runs/{name} --text "..."\n```'
  else:
    asks = '--fill "... [MASK]"' if run.cfg.model.family == "encoder" else '--prompt "..."'
    yield f"flaxlm infer runs/{name} {asks}\n```"


def training(run: Run) -> Iterator[str]:
  yield "\n## Training\n"
  if not run.step:
    yield "flaxlm has not trained it; how it came to be is not known here."
    return
  cfg = run.cfg
  rows, length = cfg.data.batch_size, cfg.data.seq_len
  most = f"{run.step * rows * length:,}"
  yield from table(
    {
      "data": "; ".join(map(code, corpora(cfg))),
      "objective": code(cfg.data.objective),
      "steps": f"{run.step:,} of {cfg.training.num_steps:,}",
      "tokens": f"{most} at most ({rows} rows of {length} a step, and what fills them)",
      "optimizer": f"{cfg.optimizer.kind}, peak rate {cfg.optimizer.learning_rate:g}, "
      f"{cfg.optimizer.schedule}",
      "precision": f"{cfg.training.dtype}, parameters in {cfg.training.param_dtype}",
      "seed": str(cfg.seed),
    }
  )


def evaluation(run: Run) -> Iterator[str]:
  """The newest figures on the held-out text up to the step that is exported."""
  step, figures = held_out(run)
  yield "\n## Evaluation\n"
  if not figures:
    yield "None that this run knows."
    return
  yield f"On the held-out part of the data, after step {step:,}:\n"
  named = {FIGURES.get(name, code(name)): f"{x:.4g}" for name, x in figures.items()}
  yield from table(named)


def held_out(run: Run) -> tuple[int, dict[str, float]]:
  found: tuple[int, dict[str, float]] = 0, {}
  for _, line in lines_of(run.path / METRICS) if run.step else ():
    figures = {
      name: float(x)
      for name, x in line.items()
      if name.startswith("eval/") and not name.startswith(LOADS)
      if type(x) in (int, float) and math.isfinite(x)
    }
    if figures and found[0] <= line["step"] <= run.step:
      found = int(line["step"]), figures
  return found


def tokenizer(run: Run) -> Iterator[str]:
  if run.tokenizer is None:
    yield "\n## Tokenizer\n\nNone came with it."
    return
  own = run.cfg.tokenizer
  is_own = own.path is None and read_origin(run.path) is None and run.step
  kind = f"{own.kind}, made with flaxlm" if is_own else "that of what it began from"
  if own.path is not None and read_origin(run.path) is None:
    kind = "another's, that was given"
  yield f"\n## Tokenizer\n\n{run.tokenizer.vocab_size:,} ids; {kind}."


def config(run: Run) -> Iterator[str]:
  """What differs from flaxlm's defaults, of the sections that are of the model's making."""
  defaults: Mapping[str, Any] = {"model": ModelConfig()}
  yield "\n## Config\n\nWhat is not flaxlm's default:\n\n```"
  for section in SECTIONS if run.step else SECTIONS[:1]:
    before = defaults.get(section, getattr(Config(), section))
    changed = difference(before, getattr(run.cfg, section), f"{section}.")
    for name, (_, value) in changed.items():
      if name != "training.sample_prompt":
        yield f"{name} = {value}"
  yield "```"


def corpora(cfg: Config) -> list[str]:
  """The corpora of a config; of files, only the last part of their pattern."""
  mixture = parse_mixture(cfg.data.corpus)
  names = [cfg.data.corpus] if mixture is None else mixture.corpora
  last = lambda name: f"files:{PurePosixPath(name.removeprefix('files:')).name}"
  return [last(name) if name.startswith("files:") else name for name in names]


def table(rows: Mapping[str, str]) -> Iterator[str]:
  yield "| | |\n|---|---|"
  yield from (f"| {name} | {value} |" for name, value in rows.items())


def code(text: str) -> str:
  """Text of others, so that nothing in it is markup."""
  return f"`{plain(text)}`"


def plain(text: str) -> str:
  return re.sub(r"[`|<>\[\]\\]", " ", text)
