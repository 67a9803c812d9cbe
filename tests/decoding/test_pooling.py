# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings: pooled as the files of a checkpoint say, or refused by name."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm.commands.embed import read_texts
from flaxlm.decoding.pooling import KEYS, Pooling, load_pooling, pool
from flaxlm.errors import ConfigError, DataError
from flaxlm.runs import IMPORTED_FILES

TRANSFORMER = {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "path": "2_Normalize", "type": "a.newer.place.Normalize"}


def store(run_dir: Path, **files: Any) -> Path:
  """A run's folder with files that came along; `__` in a name stands for a slash."""
  for name, value in files.items():
    path = run_dir / IMPORTED_FILES / f"{name.replace('__', '/')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
  return run_dir


def test_a_run_of_ours_has_the_mean(tmp_path: Path):
  assert load_pooling(tmp_path) == Pooling(("mean",), False, None, False, "")


@pytest.mark.parametrize(
  ("said", "modes"),
  [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
    ({KEYS["mean"]: True, KEYS["max"]: True}, ("max", "mean")),
    ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
    ({"pooling_mode": ["mean", "cls"]}, ("cls", "mean")),
  ],
)
def test_the_files_of_a_checkpoint_are_followed(
  tmp_path: Path, said: dict[str, Any], modes: tuple[str, ...]
):
  files: dict[str, Any] = {"modules": [TRANSFORMER, POOLING], "1_Pooling__config": said}
  assert load_pooling(store(tmp_path, **files)) == Pooling(modes)
  more = {
    "modules": [TRANSFORMER, POOLING, NORMALIZE],
    "sentence_bert_config": {"max_seq_length": 256, "do_lower_case": True},
    "config_sentence_transformers": {
      "prompts": {"query": "query: "},
      "default_prompt_name": "query",
    },
  }
  expected = Pooling(modes, True, 256, True, "query: ")
  assert load_pooling(store(tmp_path, **more)) == expected


@pytest.mark.parametrize(
  ("files", "told"),
  [
    ({"modules": "["}, "cannot be read"),
    ({"modules": {}}, "not a list"),
    ({"modules": [1]}, "module 0"),
    ({"modules": [TRANSFORMER, {"type": "x.Dense", "path": "2_Dense"}]}, "'Dense'"),
    ({"modules": [POOLING]}, "is missing"),
    ({"modules": [TRANSFORMER, POOLING | {"path": "../.."}]}, "is missing"),
    ({"modules": [TRANSFORMER, POOLING], "1_Pooling__config": {}}, "no pooling"),
    (
      {"modules": [TRANSFORMER, POOLING], "1_Pooling__config": {"pooling_mode": "x"}},
      "no pooling",
    ),
    ({"modules": [TRANSFORMER], "sentence_bert_config": {"max_seq_length": "9"}}, "'9'"),
    (
      {
        "modules": [TRANSFORMER],
        "config_sentence_transformers": {"default_prompt_name": 1},
      },
      "no prompt 1",
    ),
  ],
)
def test_what_flaxlm_lacks_is_refused_by_name(
  tmp_path: Path, files: dict[str, Any], told: str
):
  with pytest.raises(DataError, match=told):
    load_pooling(store(tmp_path, **files))


def test_vectors_are_pooled_over_real_tokens():
  rng = np.random.default_rng(0)
  lengths = [3, 1, 5]
  x_BTD = rng.normal(size=(3, 5, 4)).astype(np.float32)
  real_BT = np.arange(5) < np.array(lengths)[:, None]
  expected = {
    "cls": [x[0] for x in x_BTD],
    "max": [x[:n].max(0) for x, n in zip(x_BTD, lengths, strict=True)],
    "mean": [x[:n].mean(0) for x, n in zip(x_BTD, lengths, strict=True)],
    "mean_sqrt_len_tokens": [
      x[:n].sum(0) / n**0.5 for x, n in zip(x_BTD, lengths, strict=True)
    ],
    "weightedmean": [
      np.average(x[:n], 0, np.arange(1, n + 1)) for x, n in zip(x_BTD, lengths, strict=True)
    ],
    "lasttoken": [x[n - 1] for x, n in zip(x_BTD, lengths, strict=True)],
  }
  assert expected.keys() == KEYS.keys()
  arrays = (jnp.array(x_BTD), jnp.array(real_BT), jnp.array(lengths))
  found = np.asarray(pool(tuple(KEYS), *arrays))
  np.testing.assert_allclose(
    found, np.concatenate([*map(np.array, expected.values())], -1), rtol=1e-5, atol=1e-6
  )


def test_a_file_of_texts_has_one_a_line(tmp_path: Path):
  path = tmp_path / "texts.txt"
  path.write_text("a cat\r\nno\u2028break\n", "utf-8", newline="")
  assert read_texts(str(path)) == ["a cat", "no\u2028break"]
  path = path.with_suffix(".jsonl")
  path.write_text('{"text": "a\\ncat", "id": 3}\n{"text": "b"}\n')
  assert read_texts(str(path)) == ["a\ncat", "b"]
  for text in ("a\n\nb\n", ""):
    (tmp_path / "empty.txt").write_text(text)
    with pytest.raises(ConfigError, match="is empty"):
      read_texts(str(tmp_path / "empty.txt"))
  for line in ("{}", "[", "[1]", '{"text": 3}', '{"text": ""}', "[" * 9999):
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(ConfigError, match="line 2 has no text"):
      read_texts(str(path))
