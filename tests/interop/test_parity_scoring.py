# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of a run are those that `transformers` gives its export."""

from pathlib import Path

import pytest
import tiny_tokenizers
from conftest import BESIDE_TRANSFORMERS
from test_transfer import own_run
from tiny_models import tiny

from flaxlm.config import ModelConfig
from flaxlm.decoding.loading import load_run
from flaxlm.decoding.scoring import score_continuations, score_rolling
from flaxlm.interop.transfer import export_run, import_run
from flaxlm.sharding import make_mesh

pytestmark = BESIDE_TRANSFORMERS

PAIRS = [
  ("the cat", " sat"),
  ("the ", "mat"),
  ("", "théâtre"),
  ("a" * 70, "b é"),
  ("c", "d"),
]


def test_a_run_of_ours(tmp_path: Path):
  import torch
  import transformers

  sizes = dict(width=32, depth=2, context=64)
  run = load_run(own_run(tmp_path, ModelConfig(**sizes)), make_mesh({"data": -1}))
  export_run(run, tmp_path / "out", None, 10**9)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
  encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode

  def logprob(ids: list[int], num_scored: int) -> float:
    read = torch.tensor([ids[-65:][:-1]])
    with torch.no_grad():
      logprobs_TV = torch.log_softmax(model(read).logits[0], -1)
    scored = torch.tensor(ids[-num_scored:])
    return float(logprobs_TV[-num_scored:].gather(1, scored[:, None]).sum())

  for (context, continuation), found in zip(
    PAIRS, score_continuations(run, PAIRS), strict=True
  ):
    whole, before = encode(context + continuation), encode(context.rstrip())
    expected = logprob(whole, len(whole) - len(before))
    assert found.logprob == pytest.approx(expected, rel=1e-5)
    assert found.num_cut == max(0, len(whole) - 65)
  [found] = score_rolling(run, [run.tokenizer.encode("f" * 60)])
  assert found.logprob == pytest.approx(logprob(encode("f" * 60), 60), rel=1e-5)


def test_an_encoder_decoder(tmp_path: Path):
  import torch

  theirs = tiny("t5")
  tokenizer = tiny_tokenizers.t5()
  tokenizer.save(str(theirs.folder / "tokenizer.json"))
  mesh = make_mesh({"data": -1})
  import_run(theirs.folder, tmp_path / "run", mesh)
  pairs = [("the cat", "sat"), ("a", "cat sat the"), ("sat", "b")]
  found = score_continuations(load_run(tmp_path / "run", mesh), pairs)
  for (source, target), likelihood in zip(pairs, found, strict=True):
    labels = torch.tensor([tokenizer.encode(target, add_special_tokens=False).ids])
    with torch.no_grad():
      read = torch.tensor([tokenizer.encode(source).ids])
      written = torch.nn.functional.pad(labels, (1, -1))  # begins with the padding's id, 0
      logits = theirs.model(input_ids=read, decoder_input_ids=written).logits[0]
    logits = logits[:, : tokenizer.get_vocab_size()]  # only those can be written
    own = torch.log_softmax(logits, -1).gather(1, labels[0][:, None])
    assert likelihood.logprob == pytest.approx(float(own.sum()), rel=1e-5)
    assert likelihood.is_greedy == bool((logits.argmax(-1) == labels[0]).all())
