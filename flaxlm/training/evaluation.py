# SPDX-License-Identifier: Apache-2.0
"""How good a model is on held-out text: loss, bits per byte, masks filled, BLEU."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flaxlm.config import OBJECTIVES, DpoConfig, ResolvedConfig, TokenizerConfig
from flaxlm.data.batches import Batches
from flaxlm.data.corpus import WHOLE, Log
from flaxlm.data.prepare import prepare_data, prepare_whole
from flaxlm.data.questions import prepare_questions
from flaxlm.data.sources import find_corpus, read_pairs
from flaxlm.data.storage import data_dir, locked
from flaxlm.data.stores import MixedStore, PairStore, Store
from flaxlm.data.tokenizing import SILENT_SECONDS
from flaxlm.decoding.completions import search
from flaxlm.decoding.encoding import check_has_head
from flaxlm.decoding.loading import Run, load_reference
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.runs import TOKENIZER
from flaxlm.sharding import batch_parts
from flaxlm.tokenizers import AnyTokenizer
from flaxlm.training.layers import LOADS, named_loads
from flaxlm.training.preference import preference_figures
from flaxlm.training.rewards import load_judge
from flaxlm.training.rollouts import AnswerEvaluator, Writer
from flaxlm.training.step import jit_eval_step, put_batch

PAIRS_AT_A_TIME = 32
COUNTED_TOKENS = 2**24  # at a time: NumPy copies them as int64
BY_SOURCE = "eval/loss/"  # before the name of a mixture's source


class Evaluator:
  """The loss on the held-out split, and what is computed from it."""

  def __init__(
    self,
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    batches: Batches | Mapping[str, Batches],
    num_batches: int | None,
    mesh: Mesh,
    dpo: DpoConfig | None = None,
    counts_loads: bool = False,
  ):
    """`batches` are those of the split or, of a mixture, of each source by its name.

    `num_batches` limits the evaluation of each; None takes the whole split. With `dpo`
    they are of preferences, which are compared with a reference. `counts_loads` also tells
    the load of each expert.
    """
    self.sources = {"": batches} if isinstance(batches, Batches) else batches
    self.mesh, self.tokenizer = mesh, tokenizer
    self._limits = {
      name: min(whole_batches(one), num_batches or whole_batches(one))
      for name, one in self.sources.items()
    }
    self.num_batches = sum(self._limits.values())
    self.model_cfg = model.cfg
    self.eval_step = jit_eval_step(model, mesh, dpo, counts_loads)
    self.fills = OBJECTIVES[model.cfg.family] == "masked"
    self.answers = any(one.objective == "chat" for one in self.sources.values())

  def __call__(
    self, params: Any, progress: Callable[[], None] = lambda: None, reference: Any = None
  ) -> dict[str, float]:
    """The figures of the split; `progress` is called after each batch."""
    return self.figures(self.sums(params, progress, reference))

  def sums(
    self, params: Any, progress: Callable[[], None] = lambda: None, reference: Any = None
  ) -> dict[str, dict[str, Any]]:
    """The sums of `eval_step` over the batches of each source: numbers, or arrays."""
    sums: dict[str, dict[str, Any]] = {}
    for source, limit in self._limits.items():
      of_source = sums.setdefault(source, {})
      for n in range(limit):
        batch = put_batch(self.sources[source][n], self.mesh)
        for name, value in self.eval_step(params, batch, reference).items():
          number = float(value) if value.ndim == 0 else np.asarray(value, float)
          of_source[name] = of_source.get(name, 0.0) + number
        progress()
    return sums

  def figures(self, sums: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Averages over the split's tokens, end-of-text tokens included; bytes are the text's.

    Of a mixture, all tokens count alike, whatever its weights; `eval/loss/SOURCE` and its
    like are the figures of each source.

    A model that fills masks sees the text on both sides of them, so bits per byte would not
    compare with a compressor's: its accuracy is reported instead. Nor would those of
    answers, which are given their questions.

    Text that is unknown to the tokenizer costs eight bits a byte, as if it were written out
    behind its token: it would cost nothing where it should cost most.
    """
    names = [*sums]
    together = {key: sum(sums[name][key] for name in names) for key in sums[names[0]]}
    values = self._figures(together, names)
    if len(names) > 1:
      for name in names:
        of_source = self._figures(sums[name], [name])
        values |= {f"{key}/{name}": value for key, value in of_source.items()}
    if LOADS in together:
      values |= named_loads(self.model_cfg, together[LOADS])
    return values

  def _figures(self, sums: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    if "pairs" in sums:
      return preference_figures(sums)
    loss = sums["nats"] / sums["tokens"]
    values = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
    if self.fills:
      return values | {"eval/accuracy": sums["hits"] / sums["tokens"]}
    if self.answers:
      return values
    num_bytes = sum(self._num_bytes[name] for name in names)
    bits = sums["nats"] / math.log(2)
    if self.tokenizer.unknown_id is not None:
      unknown = [self._unknown[name] for name in names]
      values["eval/unknown"] = sum(one.tokens for one in unknown) / sums["tokens"]
      bits += 8 * sum(one.num_bytes for one in unknown)
    values["eval/bits_per_byte"] = bits / max(num_bytes, 1)
    marks = [self._gzip_bits(name) for name in names]
    if all(bits is not None for bits in marks):  # of the same text
      values["eval/gzip_bits_per_byte"] = sum(filter(None, marks)) / max(num_bytes, 1)
    return values

  def _gzip_bits(self, name: str) -> float | None:
    """What gzip makes of a source, if all of it is evaluated and that is known."""
    per_byte = self.sources[name].store.gzip_bits_per_byte
    if per_byte is None or self._limits[name] != self.sources[name].num_batches:
      return None
    return per_byte * self._num_bytes[name]

  @functools.cached_property
  def _num_bytes(self) -> dict[str, int]:
    """Of each source; the same in every evaluation."""
    sizes_V = self.tokenizer.token_bytes()
    found = {}
    for name, batches in self.sources.items():
      found[name] = batches.num_bytes(self._limits[name], sizes_V)
      if not batches.is_whole_text(self._limits[name]):  # else they are known
        found[name] += self._unknown[name].num_bytes
    return found

  @functools.cached_property
  def _unknown(self) -> dict[str, "Unknown"]:
    """What is unknown of each source, among the tokens that are predicted."""
    id_, sizes_V = self.tokenizer.unknown_id, self.tokenizer.token_bytes()
    if id_ is None:
      return {name: Unknown(0, 0) for name in self.sources}
    is_unknown_V = np.arange(len(sizes_V)) == id_
    found = {}
    for name, batches in self.sources.items():
      tokens = batches.count(self._limits[name], is_unknown_V)
      found[name] = Unknown(tokens, round(tokens * unknown_size(batches, sizes_V, id_)))
    return found

  @property
  def notes(self) -> list[str]:
    """What happened to text of the split that did not fit into rows."""
    return [note for batches in self.sources.values() for note in batches.notes]

  @property
  def num_bytes(self) -> int:
    """Bytes of the text whose tokens are predicted."""
    return sum(self._num_bytes.values())


class Unknown(NamedTuple):
  """Tokens for what a tokenizer does not know, and the bytes of text that they replace."""

  tokens: int
  num_bytes: int


def unknown_size(batches: Batches, sizes_V: np.ndarray, unknown_id: int) -> float:
  """The mean bytes of an unknown token: what the others leave of all bytes of the split."""
  store = batches.store
  assert not isinstance(store, MixedStore), "each source has its batches"
  text = store.target if isinstance(store, PairStore) else store
  begins = text.tokens[text.bounds[:-1]]  # which are no text
  count_V = -np.bincount(begins, minlength=len(sizes_V))
  for start in range(0, len(text.tokens), COUNTED_TOKENS):
    some = text.tokens[start : start + COUNTED_TOKENS]
    count_V += np.bincount(some, minlength=len(sizes_V))
  left = text.num_bytes - int(count_V @ sizes_V.astype(np.int64))
  return max(left, 0) / max(int(count_V[unknown_id]), 1)


def evaluate_run(
  run: Run, corpus: str | None, split: str | None, num_batches: int | None, log: Log
) -> dict[str, Any]:
  """The evaluation of a stored run, with the run's tokenizer, and what it is of: corpus,
  split, and the tokens and bytes that were predicted.

  Without a corpus it is that of the run, and without a split what it holds out; a corpus
  that is named is taken whole. `log` takes lines about progress.
  """
  check_has_head(run)
  corpus, split = scored(run, corpus, split, log)
  tokenizer, data = run.path / TOKENIZER, run.cfg.data
  if data.objective == "reward":
    return evaluate_answers(run, corpus, split, num_batches, log)
  if split == WHOLE:
    store = prepare_whole(corpus, tokenizer, log, data.objective, data.text_field)
  else:
    cfg = TokenizerConfig(path=str(tokenizer))
    prepared = prepare_data(dataclasses.replace(data, corpus=corpus), cfg, log)
    store = prepared.train if split == "train" else prepared.validation
  batches = batches_by_source(run.cfg, store, run.mesh)
  dpo = run.cfg.active_dpo
  evaluator = Evaluator(run.model, run.tokenizer, batches, num_batches, run.mesh, dpo)
  reference = None if dpo is None else load_reference(run)
  all_batches = sum(map(whole_batches, batches.values()))
  of = {"corpus": corpus, "split": split, "bytes": evaluator.num_bytes}
  log(
    f"{corpus} ({split}): {store.num_tokens:,} tokens, "
    f"{evaluator.num_batches:,} of {all_batches:,} batches to evaluate"
  )
  for note in evaluator.notes:
    log(note)
  progress = Progress(evaluator.num_batches, log)
  sums = evaluator.sums(run.params, progress, reference)
  tokens = round(sum(of_source["tokens"] for of_source in sums.values()))
  return {**of, "tokens": tokens, **evaluator.figures(sums)}


def evaluate_answers(
  run: Run, corpus: str, split: str, num_batches: int | None, log: Log
) -> dict[str, Any]:
  """What the run's own reward says of its likeliest answers to the questions of a split."""
  judge = load_judge(run.cfg.reward.function)
  whole = split == WHOLE
  found = prepare_questions(run.cfg, corpus, run.path, judge.digest, log, whole)
  evaluator = AnswerEvaluator(Writer(run), judge, found.splits[split], num_batches)
  for note in found.notes:
    log(note)
  of = {"corpus": corpus, "split": split, "questions": len(evaluator.asked)}
  return {**of, **evaluator(run.params)}


def scored(run: Run, corpus: str | None, split: str | None, log: Log) -> tuple[str, str]:
  """(corpus, split) of an evaluation; see `evaluate_run`."""
  own = run.cfg.data.corpus
  if corpus is None:
    return own, split or "validation"
  if corpus == own and split is None and run.step:  # an imported run is at step 0
    log(
      f"{corpus} is what {run.path} has learnt from: its split `train` is scored too; "
      "--split validation leaves it out"
    )
  return corpus, split or WHOLE


class Progress:
  """Called after each batch: a line every ten seconds says how many are done."""

  def __init__(self, num_batches: int, log: Log):
    self.num_batches, self.log = num_batches, log
    self.done, self.told = 0, time.monotonic()

  def __call__(self) -> None:
    self.done += 1
    if time.monotonic() - self.told > SILENT_SECONDS:
      self.told = time.monotonic()
      self.log(f"{self.done:,} of {self.num_batches:,} batches evaluated")


def describe_evaluation(values: Mapping[str, Any]) -> str:
  if "eval/reward" in values:
    right = values.get("eval/accuracy")
    answers = "" if right is None else f", {right:.1%} of the answers right"
    return f"reward {values['eval/reward']:.3f}{answers}"
  losses = [
    f"{key.removeprefix(BY_SOURCE)} {value:.3f}"
    for key, value in values.items()
    if key.startswith(BY_SOURCE)
  ]
  of_sources = f" ({', '.join(losses)})" if losses else ""
  if "eval/margin" in values:
    right, margin = values["eval/accuracy"], values["eval/margin"]
    return (
      f"loss {values['eval/loss']:.3f}{of_sources}, {right:.1%} of the pairs in the right "
      f"order, margin {margin:.3f}"
    )
  perplexity = values["eval/perplexity"]
  text = f"loss {values['eval/loss']:.3f}{of_sources}, perplexity {perplexity:.1f}"
  if "eval/accuracy" in values:
    return f"{text}, {values['eval/accuracy']:.1%} of the masks filled rightly"
  if "eval/bits_per_byte" not in values:
    return text
  text += f", {values['eval/bits_per_byte']:.3f} bits per byte"
  gzip = values.get("eval/gzip_bits_per_byte")
  text = text if gzip is None else f"{text} (gzip -9: {gzip:.3f})"
  if unknown := values.get("eval/unknown"):
    text += f", {unknown:.1%} of the tokens unknown, at 8 bits for each of their bytes"
  return text


class Translation(NamedTuple):
  """BLEU of a model's translations, and of the sources taken for translations."""

  corpus: str
  split: str
  bleu: float
  copy_bleu: float
  num_pairs: int
  signature: str  # what sacrebleu needs to be reproduced
  examples: list[tuple[str, str, str]]  # (source, reference, translation)


def translate_run(
  run: Run,
  corpus: str | None,
  split: str | None,
  num_pairs: int,
  num_beams: int,
  log: Log,
) -> Translation:
  """Translates the first pairs of a split and scores them with sacrebleu (Post, 2018).

  Which corpus and which split are those of `evaluate_run`.

  Raises `ConfigError` where sacrebleu is missing or the model does not translate.
  """
  if run.cfg.model.family != "encoder_decoder":
    raise ConfigError(f"{run.path} does not translate", "BLEU is for encoder-decoders")
  try:
    import sacrebleu
  except ImportError as e:
    raise ConfigError("BLEU needs sacrebleu", "pip install 'flaxlm[translation]'") from e
  corpus, split = scored(run, corpus, split, log)
  found = find_corpus(corpus, log, whole=split == WHOLE)
  with locked(data_dir(), log):
    sources, references = read_pairs(found, split, data_dir() / "tfds")
  # A source longer than the model's context cannot be read.
  fits = lambda text: len(run.tokenizer.encode(text)) < run.model.cfg.context
  pairs = [(s, r) for s, r in zip(sources, references, strict=True) if fits(s)][:num_pairs]
  translations = []
  for start in range(0, len(pairs), PAIRS_AT_A_TIME):
    some = [source for source, _ in pairs[start : start + PAIRS_AT_A_TIME]]
    translations += [best.completion for best in search(run, some, num_beams)]
  wanted = [[reference for _, reference in pairs]]
  metric = sacrebleu.BLEU()
  score = metric.corpus_score(translations, wanted).score
  copied = metric.corpus_score([source for source, _ in pairs], wanted).score
  examples = [(*pair, t) for pair, t in zip(pairs, translations, strict=True)]
  signature = str(metric.get_signature())
  return Translation(corpus, split, score, copied, len(pairs), signature, examples[:5])


def split_batches(cfg: ResolvedConfig, store: Store, mesh: Mesh, shuffled: bool) -> Batches:
  """This process's share of a split: shuffled for training, in order for evaluation."""
  parts, num_parts = batch_parts(mesh, jax.process_index())
  return Batches(
    store,
    cfg.data,
    vocab_size=cfg.model.num_ids,
    seed=cfg.seed if shuffled else None,
    num_epochs=cfg.data.num_epochs if shuffled else 1,
    parts=parts,
    num_parts=num_parts,
    # A run that there is already was imported, or it has begun from such a one.
    may_lack_ids=cfg.init is not None or not shuffled,
  )


def batches_by_source(cfg: ResolvedConfig, store: Store, mesh: Mesh) -> dict[str, Batches]:
  """This process's share of a split in order: of each source of a mixture, by its name."""
  sources = store.sources if isinstance(store, MixedStore) else {cfg.data.corpus: store}
  return {name: split_batches(cfg, one, mesh, False) for name, one in sources.items()}


def whole_batches(batches: Batches) -> int:
  """The number of batches of a split that is read once."""
  assert batches.num_batches is not None, "one epoch"
  return batches.num_batches
