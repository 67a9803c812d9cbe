# SPDX-License-Identifier: Apache-2.0
"""Laws around the model: text, rows, and checkpoints of others."""

import tempfile
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from flaxlm.config import OBJECTIVES, DataConfig
from flaxlm.data.batches import Batches
from flaxlm.data.objectives import Batch
from flaxlm.data.stores import PairStore, TokenStore
from flaxlm.errors import CheckpointError
from flaxlm.interop.families import FAMILIES
from flaxlm.interop.huggingface import load_checkpoint, save_checkpoint
from flaxlm.strict_json import to_json
from flaxlm.tokenizers import train_tokenizer
from flaxlm.verify.case import Case, Finding, Law, does_not_apply

TEXTS = (
  "Words, and  two blanks;\ttabs\n\nand lines.\r\n def f(x): return x ** 2  # 3.14\n",
  " naïve café, Größe, 中文字符, कार्य, русский, e\u0301, \N{OX}\N{ZERO WIDTH JOINER}",
  "<|endoftext|> is [MASK] and [UNK] in a text, as are <s> and </s>",
  "",
  "\x00\x01 \x7f",
)
NUM_TOKENS = 1000


def tokenizer(case: Case) -> Finding:
  """One of the config's kind, trained on a page, on texts of many scripts."""
  cfg = case.cfg.tokenizer
  if cfg.path is not None:
    return does_not_apply("tokenizer.path names one that was not made here")
  if cfg.kind == "word":
    return does_not_apply("a tokenizer of whole words does not know all")
  masked = case.cfg.data.objective == "masked"
  size = min(cfg.vocab_size, 700)
  trained = train_tokenizer(cfg.kind, [TEXTS[0] * 20, TEXTS[1]], size, masked)
  wrong = [text for text in TEXTS if trained.decode(trained.encode(text)) != text]
  return Finding(float(len(wrong)), details=[f"{text!r} is not itself" for text in wrong])


def every_row(case: Case) -> Finding:
  """A shuffled epoch, read by one process, by two and by four."""
  objective = OBJECTIVES[case.family]
  store = store_of(objective)
  cfg = DataConfig(seq_len=8, batch_size=8, objective=cast(Any, objective))
  details = []

  def batches(parts: int, process: int) -> Batches:
    options: dict[str, Any] = dict(vocab_size=store.vocab_size, seed=case.cfg.seed)
    return Batches(store, cfg, **options, parts=(process,), num_parts=parts)

  whole = batches(1, 0)
  assert whole.num_batches is not None
  seen = []
  for n in range(whole.num_batches):
    seen += rows_of(whole[n])
    for parts in (2, 4):
      together = [row for p in range(parts) for row in all_rows(batches(parts, p)[n])]
      if together != all_rows(whole[n]):
        details.append(f"{parts} processes read another batch {n} than one does")
  if len(seen) != len(set(seen)):
    details.append("an epoch has a row twice")
  text = store.target if isinstance(store, PairStore) else store
  lost = {*text.tokens.tolist()} - {0} - {token for row in seen for token in row}
  if lost:
    details.append(f"an epoch leaves {len(lost)} tokens out")
  return Finding(float(len(details)), details=details[:3])


def store_of(objective: str) -> TokenStore | PairStore:
  """Tokens that tell their place: token i is i, but for a bos at the start of a text."""

  def text(num_tokens: int, every: int) -> TokenStore:
    tokens = np.arange(num_tokens, dtype=np.uint32)
    tokens[::every] = 0
    bounds = np.append(np.arange(0, num_tokens, every), num_tokens)
    specials = num_tokens, (0, num_tokens)  # the mask, and all
    return TokenStore(tokens, bounds, 0, num_tokens + 1, num_tokens, None, *specials)

  if objective == "seq2seq":  # as many sources of 5 tokens as targets of 4
    return PairStore(text(NUM_TOKENS // 4 * 5, 5), text(NUM_TOKENS, 4))
  return text(NUM_TOKENS, 10)


def all_rows(batch: Batch) -> list[tuple[int, ...]]:
  """Every row as what is in it, masked or not, and what is to be predicted."""
  columns = (batch.tokens_BT, batch.targets_BT, batch.weights_BT)
  return [tuple(row) for row in np.concatenate(columns, 1).tolist()]


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
  """The text of each row that is not padding: what was masked is in the targets."""
  is_real_B = batch.weights_BT.sum(1) > 0
  text_BT = np.where(batch.weights_BT == 1, batch.targets_BT, batch.tokens_BT)
  return [tuple(row) for row in text_BT[is_real_B].tolist()]


def exported(case: Case) -> Finding:
  """Written as a checkpoint of the first Hugging Face family that can express the model,
  and read again; the vocabulary's padding is left out."""
  before = flatten_dict(jax.device_get(case.params), sep="/")
  for family in (family for family in FAMILIES.values() if family.inner is None):
    with tempfile.TemporaryDirectory() as name:
      folder = Path(name)
      try:
        keys = save_checkpoint(
          folder, case.model_cfg, case.params, family, "float32", 10**9
        )
      except CheckpointError:
        continue
      (folder / "config.json").write_text(to_json(keys), "utf-8")
      loaded = load_checkpoint(folder, case.one)
    after = flatten_dict(jax.device_get(loaded.params), sep="/")
    if before.keys() != after.keys():
      names = sorted(before.keys() ^ after.keys())
      return Finding(0.0, details=[f"not on both sides: {', '.join(names[:3])}"])
    errors = [
      np.abs(before[path][tuple(map(slice, array.shape))] - array).max()
      for path, array in after.items()
    ]
    return Finding(float(max(errors)))
  return does_not_apply("no Hugging Face family can express the model")


STORED = "norms that are stored less 1"
LAWS = (
  Law("tokenizer", "decode(encode(s)) = s", tokenizer, 0.0, "texts are counted"),
  Law("every row", "processes read every row once", every_row, 0.0, "rows are counted"),
  Law("exported", "export, then import, is the identity", exported, 1e-6, STORED),
)
