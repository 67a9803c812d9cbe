# SPDX-License-Identifier: Apache-2.0
"""A page is complete and self-contained, and no data can break it."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from look_runs import BYTES, HOSTILE, MASKED, TINY, Page, arrays, page_of

from flaxlm.config import ModelConfig
from flaxlm.errors import ConfigError
from flaxlm.look.page import check_output, pack, save_view, to_html, to_json
from flaxlm.look.pieces import describe, legible, make_reading
from flaxlm.look.view import Shares, View


@given(st.dictionaries(st.text(), st.text() | st.floats(allow_nan=False)))
def test_json_inside_a_script_is_the_same_and_cannot_end_it(values: dict):
  text = to_json({"x": {k: v for k, v in values.items() if v not in (np.inf, -np.inf)}})
  assert text.isascii() and not set(text) & set("<>&")
  assert json.loads(text)["x"] == {
    k: v for k, v in values.items() if v not in (np.inf, -np.inf)
  }


def test_hostile_text_everywhere_leaves_the_page_whole():
  figures = {"tokens": [{"label": HOSTILE, HOSTILE: [HOSTILE]}]}
  view = View("run", HOSTILE, [HOSTILE], [HOSTILE], figures, {"x": HOSTILE})
  page = page_of(view)
  assert page.view == view._asdict()
  assert [tag for tag, _ in page.tags].count("title") == 1
  plain = Page(to_html(View("run", "a", [], [], {}, {})))
  assert page.tags == plain.tags, "the same elements and policy, whatever the data"
  assert page.scripts[1] == plain.scripts[1]


KINDS = ("attention", "embeddings", "positions", "tokens", "run", "bench", "story")


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_allows_our_script_and_style_and_nothing_else(kind: str):
  page = page_of(View(kind, "a", [], [], {}, {}))
  (policy,) = [a["content"] for tag, a in page.tags if "http-equiv" in a]
  rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
  assert rules["default-src"] == "'none'"
  for rule, text in (("script-src", page.scripts[1]), ("style-src", page.styles[0])):
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert rules[rule] == f"'sha256-{digest}'"
  for tag, attributes in page.tags:
    assert not {"src", "style", "onclick", "onload"} & set(attributes), tag
  assert "innerHTML" not in page.scripts[1] and "eval(" not in page.scripts[1]


def test_arrays_come_back():
  rng = np.random.default_rng(0)
  exact = rng.normal(size=(3, 4)).astype(np.float32)
  np.testing.assert_array_equal(arrays(pack(exact)), exact)
  shares = rng.uniform(size=(2, 3, 5))
  back = arrays(json.loads(to_json({"x": Shares(shares)})))["x"]
  assert back.shape == shares.shape
  np.testing.assert_allclose(back, shares, atol=0.5000001 / 65535)
  ends = arrays(pack(Shares(np.array([0.0, 1.0]))))
  np.testing.assert_array_equal(ends, [0, 1])


def test_an_output_is_refused_early(tmp_path: Path):
  (tmp_path / "a.html").mkdir()
  for path, text in (("a.pdf", ".html nor .png"), ("a.html", "directory"), ("a", ".png")):
    with pytest.raises(ConfigError, match=text):
      check_output(tmp_path / path)
  (tmp_path / "file").touch()
  with pytest.raises(ConfigError, match="cannot be written"):
    save_view(View("run", "a", [], [], {}, {}), tmp_path / "file" / "b.html")


# -- Tokens, legible -----------------------------------------------------------------------


@given(st.binary(max_size=8))
def test_every_byte_can_be_seen(data: bytes):
  shown = legible(data)
  assert shown.isprintable() and " " not in shown
  assert bool(shown) == bool(data)


def test_blanks_ends_of_line_and_half_characters_are_drawn():
  assert legible(b" a\n\tb") == "·a↵→b"
  assert legible("é漢".encode()) == "é漢"
  assert legible("漢".encode()[:2]) == "\\xe6\\xbc"
  assert legible("\u202e\u0301".encode()) == "\\u202e\\u0301"


def test_pieces_have_their_bytes_and_names():
  ids = BYTES.encode("é!")
  end, unused = BYTES.eos_id, BYTES.vocab_size + 3
  first, second, mark, special, none = describe(BYTES, [*ids, end, unused])
  assert (first.label, second.label, mark.label) == ("\\xc3", "\\xa9", "!")
  assert bytes.fromhex(first.hex + second.hex + mark.hex) == "é!".encode()
  assert special.label == special.name == "<|endoftext|>" and special.special
  assert special.hex == "" == none.hex and none.label == f"(unused {unused})"


def reading(family: str, text: str | None = None, source: str | None = None, most=99):
  cfg = ModelConfig(**{"family": family} | TINY).resolve()
  tokenizer = MASKED if family == "encoder" else BYTES
  return make_reading(cfg, tokenizer, text, source, most)


def test_a_text_is_read_as_in_training_and_cut_with_a_word():
  assert reading("decoder", "ab").ids == [BYTES.bos_id, 97, 98]
  assert reading("encoder", "a [MASK]").ids == [MASKED.bos_id, 97, MASKED.mask_id]
  both = reading("encoder_decoder", "b", "a")
  assert (both.ids, both.source_ids) == ([BYTES.bos_id, 98], [97, BYTES.eos_id])
  assert reading("encoder_decoder", None, "a").ids is None
  long = reading("decoder", "a" * 60)
  assert len(long.ids) == 48 and "61 tokens" in long.cuts[0]
  assert "model.context=48" in long.cuts[0]
  short = reading("decoder", "a" * 60, most=10)
  assert len(short.ids) == 10 and "--max-tokens 10" in short.cuts[0]


@pytest.mark.parametrize(
  ("family", "text", "source", "words"),
  [
    ("decoder", None, None, "there is no text"),
    ("decoder", "", None, "text is empty"),
    ("rnn", "a", "b", "model.family=rnn reads no source"),
    ("encoder_decoder", "a", None, "there is none"),
    ("encoder_decoder", "a", "", "source is empty"),
  ],
)
def test_a_text_that_is_not_for_the_family_is_refused(family, text, source, words):
  with pytest.raises(ConfigError, match=words):
    reading(family, text, source)


def test_an_id_past_the_model_is_refused():
  cfg = ModelConfig(**TINY | {"vocab_size": 257}).resolve()
  small = ModelConfig(**TINY | {"vocab_size": 64}).resolve()
  assert make_reading(cfg, BYTES, "a", None, 9).ids
  with pytest.raises(ConfigError, match="ids below 64"):
    make_reading(small, BYTES, "a", None, 9)
