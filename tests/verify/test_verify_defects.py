# SPDX-License-Identifier: Apache-2.0
"""`flaxlm verify` finds planted defects, by the law that is about them (slow).

The defects are planted in a copy of the source, as `tests/planted.py` does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from planted import Defect, copy_tree, mutated
from test_verify import RICH

HERE = "verify/test_verify_defects.py"
# Every defect, and the laws that name it.
DEFECTS = {
  "mask off by one": (
    "flaxlm/nn/masks.py",
    "masks.append(key <= query)",
    "masks.append(key <= query + 1)",
    ["causal"],
  ),
  "mask off by one, to the other side": (
    "flaxlm/nn/masks.py",
    "masks.append(key <= query)",
    "masks.append(key <= jnp.maximum(query - 1, 0))",
    ["causal"],
  ),
  "positions not restarted": (
    "flaxlm/data/objectives.py",
    "np.where(real_BT, index_T - start_of_BT, 0)",
    "np.where(real_BT, index_T, 0)",
    ["packed"],
  ),
  "packed documents see each other": (
    "flaxlm/nn/masks.py",
    "where.query_segments_BT[:, :, None] == where.key_segments_BS[:, None]",
    "where.query_segments_BT[:, :, None] >= where.key_segments_BS[:, None]",
    ["packed"],
  ),
  "cache written one slot late": (
    "flaxlm/nn/cache.py",
    "return write_slots(old_BKSH, new_BKTH, slots.first_slots_B)",
    "return write_slots(old_BKSH, new_BKTH, slots.first_slots_B + 1)",
    ["cached", "generated"],
  ),
  "a window off by one": (
    "flaxlm/nn/masks.py",
    "near = key > query - window",
    "near = key >= query - window",
    ["window", "attention"],
  ),
  "a rule left replicated": (
    "flaxlm/sharding/rules.py",
    '"embed": ("fsdp",),',
    '"embed": (),',
    ["layout"],
  ),
  "loss averaged per part": (
    "flaxlm/training/step.py",
    "    result = function(params, *part)\n",
    "    result = function(params, *part)\n"
    "    rows = part[0].weights_BT.sum()\n"
    "    share = batch.weights_BT.sum() / num_parts / rows\n"
    "    result = jax.tree.map(lambda x: x * share, result)\n",
    ["accumulation", "loss"],
  ),
  "dropout key reused in every step": (
    "flaxlm/training/step.py",
    "key = jax.random.fold_in(jax.random.key(seed), state.step)",
    "key = jax.random.key(seed)",
    ["dropout"],
  ),
  "dropout key reused in every micro-batch": (
    "flaxlm/training/step.py",
    "parts = jax.tree.map(cut, batch), jax.random.split(key, num_parts)",
    "parts = jax.tree.map(cut, batch), jnp.stack([key] * num_parts)",
    ["dropout"],
  ),
  "dropout key reused in every layer": (
    "flaxlm/nn/stack.py",
    'jax.random.split(self.make_rng("dropout"), self.cfg.depth)',
    'jnp.stack([self.make_rng("dropout")] * self.cfg.depth)',
    ["dropout"],
  ),
  "RoPE on the wrong half": (
    "flaxlm/nn/positions.py",
    "first, second, rest = jnp.split(x_BTNH, (half, 2 * half), -1)",
    "rest, first, second = jnp.split(x_BTNH, (x_BTNH.shape[-1] - 2 * half, "
    "x_BTNH.shape[-1] - half), -1)",
    ["rope", "attention"],
  ),
  "RoPE turns neighbouring dims": (
    "flaxlm/nn/positions.py",
    "first, second, rest = jnp.split(x_BTNH, (half, 2 * half), -1)",
    "first, second, rest = x_BTNH[..., : 2 * half : 2], x_BTNH[..., 1 : 2 * half : 2], "
    "x_BTNH[..., 2 * half :]",
    ["rope", "attention"],
  ),
  "keys are not turned": (
    "flaxlm/nn/attention.py",
    "k_BSKH = rotate(k_BSKH, cos_sin)",
    "k_BSKH = k_BSKH + 0",
    ["attention"],
  ),
  "sinks forgotten": (
    "flaxlm/nn/masks.py",
    "    if sink_tokens:\n",
    "    if False:\n",
    ["sinks", "attention"],
  ),
  "learned sinks forgotten while decoding": (
    "flaxlm/nn/kernels/cached.py",
    "sum_KG1 += jnp.exp(sinks_KG[:, :, None] - most_KG1)",
    "sum_KG1 += 0",
    ["long prompts", "prefixes"],
  ),
  "padding drawn": (
    "flaxlm/nn/vocabulary.py",
    "return jnp.where(is_token_V, logits, value)",
    "return jnp.where(is_token_V, logits, logits)",
    ["never drawn"],
  ),
  "padding drawn by the engine": (
    "flaxlm/decoding/rows.py",
    "  logits_BV = mask_padding_ids(logits_BV, drawing.num_ids)\n",
    "",
    ["never drawn"],
  ),
  "stale prefix": (
    "flaxlm/decoding/prefix_store.py",
    "key = hashlib.blake2b(key + data, digest_size=16).digest()",
    "key = hashlib.blake2b(data, digest_size=16).digest()",
    ["prefixes"],
  ),
  "stale prefix of a chat": (
    "flaxlm/decoding/engine.py",
    "tokens = [*job.request.prompt, *job.tokens[:-1]]",
    "tokens = [*job.request.prompt, *job.tokens]",
    ["prefixes"],
  ),
  "wrong kv-head mapping": (
    "flaxlm/nn/kernels/blocked.py",
    ".reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)",
    ".reshape(B, T, N // K, K, H).transpose(0, 3, 2, 1, 4)",
    ["kv heads", "attention"],
  ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return copy_tree(tmp_path_factory.mktemp("planted"))


def defect_of(name: str) -> Defect:
  file, old, new, _ = DEFECTS[name]
  return Defect(name, file, old, new, HERE)


def verify(copy: Path, laws: list[str]) -> tuple[int, dict[str, str], str]:
  """(exit code, the result of each law, what it says) of the copy's own command."""
  arguments = ["verify", "stdlib_tiny", *(f"--law={law}" for law in laws)]
  if laws != ["prefixes"]:  # an engine keeps none where layers are local
    arguments += [*RICH, "--model.layer_pattern=LG"]
  done = subprocess.run(
    [sys.executable, "-m", "flaxlm.cli", *arguments, "--json"],
    cwd=copy,
    env={
      **os.environ,
      "PYTHONPATH": str(copy),
      "PYTHONDONTWRITEBYTECODE": "1",  # see `planted.run_tests`
      "FLAXLM_DATA_DIR": str(copy / "data"),
      "JAX_PLATFORMS": "cpu",
    },
    capture_output=True,
    text=True,
  )
  results = {found["law"]: found["result"] for found in json.loads(done.stdout or "[]")}
  return done.returncode, results, done.stdout + done.stderr


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_can_be_planted(name: str):
  mutated(defect_of(name), ROOT)


@pytest.mark.slow
@pytest.mark.planted
@pytest.mark.parametrize("name", DEFECTS)
def test_verify_finds_a_defect(copy: Path, name: str):
  path, laws = copy / DEFECTS[name][0], DEFECTS[name][3]
  whole = path.read_text("utf-8")
  path.write_text(mutated(defect_of(name), copy), "utf-8")
  try:
    code, results, said = verify(copy, laws)
  finally:
    path.write_text(whole, "utf-8")
  assert code == 1, said
  assert results == dict.fromkeys(laws, "fails"), said


@pytest.mark.slow
@pytest.mark.planted
def test_without_a_defect_these_laws_hold(copy: Path):
  laws = sorted({law for *_, laws in DEFECTS.values() for law in laws})
  code, results, said = verify(copy, laws)
  assert code == 0, said
  assert results == dict.fromkeys(results, "holds"), said
