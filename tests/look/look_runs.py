# SPDX-License-Identifier: Apache-2.0
"""Random runs of every family, in memory and on disk, and pages read back."""

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
from meshes import mesh_of

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import OBJECTIVES, Config, DataConfig, ModelConfig, to_json
from flaxlm.decoding.loading import Run
from flaxlm.look.page import to_html
from flaxlm.look.view import View
from flaxlm.nn.models import abstract_params, build_model
from flaxlm.runs import CHECKPOINTS, CONFIG, TOKENIZER
from flaxlm.tokenizers import train_tokenizer

BYTES = train_tokenizer("byte", [], 0)
MASKED = train_tokenizer("byte", [], 0, masked=True)
FAMILIES = ("decoder", "encoder", "encoder_decoder", "rnn")
TINY: dict[str, Any] = dict(depth=2, width=16, num_heads=4, vocab_size=320, context=48)
# What would break out of a page that did not watch, and what no font shows.
HOSTILE = "</script><script>document.title='broken'</script><!-- & \u2028 \u202e $x$ é\t\n"


def make_run(family: str = "decoder", name: str = "random", **model: Any) -> Run:
  """A model with random parameters, large enough that it clearly prefers some tokens."""
  model_cfg = ModelConfig(**{"family": family} | TINY | model).resolve()
  data = DataConfig(objective=OBJECTIVES[family], seq_len=16)
  cfg = Config(name=name, model=model_cfg, data=data)
  lm = build_model(cfg.model)
  mesh = mesh_of()
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32),
    abstract_params(lm, mesh),
  )
  tokenizer = MASKED if family == "encoder" else BYTES
  return Run(Path("nowhere"), cfg, tokenizer, 7, lm, params, mesh)


def save_run(run: Run, folder: Path) -> Path:
  """The run as a directory that the commands open."""
  folder.mkdir(parents=True)
  (folder / CONFIG).write_text(to_json(run.cfg))
  run.tokenizer.save(folder / TOKENIZER)
  store = CheckpointStore(folder / CHECKPOINTS)
  try:
    store.save(run.step, run.params, None, {"step": run.step})
  finally:
    store.close()
  return folder


class Page(HTMLParser):
  """A page as a browser cuts it: its elements, and what stands in its scripts."""

  def __init__(self, html: str):
    super().__init__()
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.scripts: list[str] = []
    self.styles: list[str] = []
    self.inside: list[str] | None = None
    self.feed(html)
    self.close()

  def handle_starttag(self, tag: str, attrs: list) -> None:
    self.tags.append((tag, dict(attrs)))
    if tag in ("script", "style"):
      self.inside = self.scripts if tag == "script" else self.styles
      self.inside.append("")

  def handle_endtag(self, tag: str) -> None:
    self.inside = None

  def handle_data(self, data: str) -> None:
    if self.inside is not None:
      self.inside[-1] += data

  @property
  def view(self) -> Any:
    """The data, its arrays as arrays."""
    return arrays(json.loads(self.scripts[0]))


def unpack(packed: dict[str, Any]) -> np.ndarray:
  """The numbers that were given to `pack`, as the page reads them."""
  data = zlib.decompress(base64.b64decode(packed["deflated"]))
  array = np.frombuffer(data, np.dtype(packed["type"]).newbyteorder("<"))
  values = array.astype(np.float64).reshape(packed["shape"])
  return values / 65535 if packed["type"] == "uint16" else values


def arrays(value: Any) -> Any:
  if isinstance(value, dict) and "deflated" in value:
    return unpack(value)
  if isinstance(value, dict):
    return {key: arrays(x) for key, x in value.items()}
  return [arrays(x) for x in value] if isinstance(value, list) else value


def page_of(view: View) -> Page:
  page = Page(to_html(view))
  assert [tag for tag, _ in page.tags].count("script") == 2 == len(page.scripts)
  assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", to_html(view))
  return page


def log_softmax(logits: Any) -> np.ndarray:
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
