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
    "flaxlm/training/accumulation.py",
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
    "flaxlm/training/accumulation.py",
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
    "sum_BKG1 += jnp.exp(sinks_KG[:, :, None] - max_BKG1)",
    "sum_BKG1 += 0",
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
    "q.reshape(B, -1, K, N // K, H).transpose(0, 2, 3, 1, 4)",
    "q.reshape(B, -1, N // K, K, H).transpose(0, 3, 2, 1, 4)",
    ["kv heads", "attention"],
  ),
  "the other gelu": (
    "flaxlm/nn/kernels/fusion.py",
    "return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))",
    "return jax.nn.gelu(x, approximate=True)",
    ["feed-forward", "layer"],
  ),
  "a norm without its mean": (
    "flaxlm/nn/kernels/fusion.py",
    "  if centred:\n    x -= jnp.mean",
    "  if False:\n    x -= jnp.mean",
    ["norms", "layer"],
  ),
  "a norm after the sum": (
    "flaxlm/nn/block.py",
    'if self.cfg.norm_placement in {"pre", "both"}:',
    'if self.cfg.norm_placement in {"both"}:',
    ["layer"],
  ),
  "weights of experts before they are chosen": (
    "flaxlm/nn/moe.py",
    "weights_BTA /= weights_BTA.sum(-1, keepdims=True)",
    "weights_BTA *= 1",
    ["experts", "layer"],
  ),
  "later choices served first": (
    "flaxlm/nn/moe.py",
    "places_BEC = starts_BE[..., None] + jnp.arange(C)",
    "places_BEC = starts_BE[..., None] + jnp.maximum(sizes_BE[..., None] - C, 0)"
    " + jnp.arange(C)",
    ["capacity"],
  ),
  "decoding drops choices": (
    "flaxlm/nn/block.py",
    "dropping=not cached)",
    "dropping=True)",
    ["capacity"],
  ),
  "a state that is kept at a document's start": (
    "flaxlm/nn/rnn.py",
    "steps = Steps(segments_BT > before_BT, segments_BT > 0)",
    "steps = Steps(segments_BT < 0, segments_BT > 0)",
    ["cell"],
  ),
  "a source's documents see each other": (
    "flaxlm/nn/stack.py",
    "mask_BTS = visible(placed, segments_BS.shape[1], causal=False)",
    "mask_BTS = visible(placed, segments_BS.shape[1], causal=True)",
    ["cross-attention", "layer"],
  ),
  "a norm in 16 bits": (
    "flaxlm/nn/kernels/fusion.py",
    "  x = x_BTD.astype(jnp.float32)\n",
    "  x = x_BTD\n",
    ["bfloat16"],
  ),
  "logits in 16 bits": (
    "flaxlm/nn/layers.py",
    "return table_dot(x_BTD, self.table.astype(self.dtype))",
    "return table_dot(x_BTD, self.table.astype(self.dtype)).astype(self.dtype)",
    ["bfloat16"],
  ),
  "adapters merged without their scale": (
    "flaxlm/nn/lora.py",
    "change *= scale.reshape(-1, *[1] * (change.ndim - 1))",
    "change *= 1",
    ["adapters"],
  ),
  "a base that learns": (
    "flaxlm/training/step.py",
    "    frozen=state.frozen,\n    reference",
    "    frozen=jax.tree.map(lambda x: x * 1.001, state.frozen),\n    reference",
    ["adapters"],
  ),
  "splash off by one": (
    "flaxlm/nn/masks.py",
    "seen = [] if self.least is None else [queries - keys >= self.least]",
    "seen = [] if self.least is None else [queries - keys > self.least]",
    ["splash"],
  ),
  "the first batches again": (
    "flaxlm/training/trainer.py",
    "with batches.iterate(first_step) as rows:",
    "with batches.iterate(0) as rows:",
    ["resumed"],
  ),
  "moments forgotten": (
    "flaxlm/training/program.py",
    'return TrainState(counter, items["params"], items["opt_state"], frozen, reference)',
    'moments = program.optimizer.init(items["params"])\n'
    '  return TrainState(counter, items["params"], moments, frozen, reference)',
    ["resumed"],
  ),
  "each process reads the first rows": (
    "flaxlm/training/evaluation.py",
    "batch_parts(mesh, jax.process_index())",
    "batch_parts(mesh, 0)",
    ["processes"],
  ),
}
# Configs that have what a law is about, where the usual one has it not.
PLAIN = ("stdlib_tiny", "--model.depth=1", "--training.dtype=bfloat16", "--lora.rank=2")
CONFIGS = {
  "the other gelu": ("bert_tiny",),
  "a norm without its mean": ("bert_tiny",),
  "weights of experts before they are chosen": ("moe_tiny",),
  "later choices served first": ("moe_tiny", "--model.moe.capacity_factor=1"),
  "decoding drops choices": ("moe_tiny", "--model.moe.capacity_factor=1"),
  "a state that is kept at a document's start": ("rnn_lstm",),
  "a source's documents see each other": ("t5_small",),
  **dict.fromkeys(("a norm in 16 bits", "logits in 16 bits"), PLAIN),
  **dict.fromkeys(("adapters merged without their scale", "a base that learns"), PLAIN),
  **dict.fromkeys(("splash off by one", "the first batches again"), PLAIN),
  **dict.fromkeys(("moments forgotten", "each process reads the first rows"), PLAIN),
}
USUAL = ("stdlib_tiny", *RICH, "--model.layer_pattern=LG")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return copy_tree(tmp_path_factory.mktemp("planted"))


def defect_of(name: str) -> Defect:
  file, old, new, _ = DEFECTS[name]
  return Defect(name, file, old, new, HERE)


def config_of(name: str) -> tuple[str, ...]:
  if DEFECTS[name][3] == ["prefixes"]:  # pieces are kept where no layer is local
    return ("stdlib_tiny",)
  return CONFIGS.get(name, USUAL)


def verify(
  copy: Path, laws: list[str], config: tuple[str, ...]
) -> tuple[int, dict[str, str], str]:
  """(exit code, the result of each law, what it says) of the copy's own command."""
  arguments = ["verify", *config, *(f"--law={law}" for law in laws)]
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
    code, results, said = verify(copy, laws, config_of(name))
  finally:
    path.write_text(whole, "utf-8")
  assert code == 1, said
  assert results == dict.fromkeys(laws, "fails"), said


@pytest.mark.slow
@pytest.mark.planted
@pytest.mark.parametrize("config", sorted({config_of(name) for name in DEFECTS}))
def test_without_a_defect_these_laws_hold(copy: Path, config: tuple[str, ...]):
  names = [name for name in DEFECTS if config_of(name) == config]
  laws = sorted({law for name in names for law in DEFECTS[name][3]})
  code, results, said = verify(copy, laws, config)
  assert code == 0, said
  assert results == dict.fromkeys(laws, "holds"), said
