# SPDX-License-Identifier: Apache-2.0
"""How good a model is on held-out text: loss, bits per byte, masks filled, BLEU."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flaxlm.config import OBJECTIVES, ResolvedConfig, TokenizerConfig
from flaxlm.data.batches import Batches
from flaxlm.data.prepare import Store, prepare
from flaxlm.data.sources import data_dir, find_corpus, read_pairs
from flaxlm.decoding.completions import search
from flaxlm.decoding.encoding import check_has_head
from flaxlm.decoding.loading import Run
from flaxlm.errors import ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.runs import TOKENIZER
from flaxlm.sharding import batch_parts
from flaxlm.tokenizers import AnyTokenizer
from flaxlm.training.step import jit_eval_step, put_batch

PAIRS_AT_A_TIME = 32


class Evaluator:
  """The loss on the held-out split, and what is computed from it."""

  def __init__(
    self,
    model: LanguageModel,
    tokenizer: AnyTokenizer,
    batches: Batches,
    num_batches: int | None,
    mesh: Mesh,
  ):
    """`num_batches` limits the evaluation; None takes the whole split."""
    self.batches, self.num_batches, self.mesh = batches, num_batches, mesh
    sizes = tokenizer.token_bytes()[: model.cfg.vocab_size]
    padding = model.cfg.vocab_size - len(sizes)
    self.token_bytes_V = np.pad(sizes, (0, padding)).astype(np.float32)
    self.eval_step = jit_eval_step(model, mesh)
    self.fills = OBJECTIVES[model.cfg.family] == "masked"

  def __call__(
    self, params: Any, progress: Callable[[], None] = lambda: None
  ) -> dict[str, float]:
    """Averages over the split's tokens, end-of-text tokens included; bytes are the text's.

    `progress` is called after each batch. A model that fills masks sees the text on both
    sides of them, so bits per byte would not compare with a compressor's: its accuracy is
    reported instead.
    """
    sums: dict[str, float] = {}
    count = self.batches.num_batches
    assert count is not None, "one epoch"
    for n in range(min(count, self.num_batches or count)):
      batch = put_batch(self.batches[n], self.mesh)
      for name, value in self.eval_step(params, batch, self.token_bytes_V).items():
        sums[name] = sums.get(name, 0.0) + float(value)
      progress()
    loss = sums["nats"] / sums["tokens"]
    values = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
    if self.fills:
      return values | {"eval/accuracy": sums["hits"] / sums["tokens"]}
    values["eval/bits_per_byte"] = sums["nats"] / math.log(2) / max(sums["bytes"], 1.0)
    gzip = self.batches.store.gzip_bits_per_byte
    if gzip is not None and self.num_batches is None:  # of the same text
      values["eval/gzip_bits_per_byte"] = gzip
    return values


def evaluate_run(
  run: Run, corpus: str, split: str, num_batches: int | None
) -> dict[str, float]:
  """The evaluation of a stored run on a split of a corpus, with the run's tokenizer."""
  check_has_head(run)
  tokenizer = TokenizerConfig(path=str(run.path / TOKENIZER))
  prepared = prepare(corpus, tokenizer, objective=run.cfg.data.objective)
  store = prepared.train if split == "train" else prepared.validation
  batches = split_batches(run.cfg, store, run.mesh, shuffled=False)
  return Evaluator(run.model, run.tokenizer, batches, num_batches, run.mesh)(run.params)


def describe_evaluation(values: dict[str, float]) -> str:
  text = f"loss {values['eval/loss']:.3f}, perplexity {values['eval/perplexity']:.1f}"
  if "eval/accuracy" in values:
    return f"{text}, {values['eval/accuracy']:.1%} of the masks filled rightly"
  text += f", {values['eval/bits_per_byte']:.3f} bits per byte"
  gzip = values.get("eval/gzip_bits_per_byte")
  return text if gzip is None else f"{text} (gzip -9: {gzip:.3f})"


class Translation(NamedTuple):
  """BLEU of a model's translations, and of the sources taken for translations."""

  bleu: float
  copy_bleu: float
  num_pairs: int
  signature: str  # what sacrebleu needs to be reproduced
  examples: list[tuple[str, str, str]]  # (source, reference, translation)


def translate_run(
  run: Run, corpus: str, split: str, num_pairs: int, num_beams: int
) -> Translation:
  """Translates the first pairs of a split and scores them with sacrebleu (Post, 2018).

  Raises `ConfigError` where sacrebleu is missing or the model does not translate.
  """
  if run.cfg.model.family != "encoder_decoder":
    raise ConfigError(f"{run.path} does not translate", "BLEU is for encoder-decoders")
  try:
    import sacrebleu
  except ImportError as e:
    raise ConfigError("BLEU needs sacrebleu", "pip install 'flaxlm[translation]'") from e
  sources, references = read_pairs(find_corpus(corpus), split, data_dir() / "tfds")
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
  return Translation(score, copied, len(pairs), str(metric.get_signature()), examples[:5])


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
  )
