# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation (DPO; Rafailov et al., 2023): from pairs of answers.

An answer's *reward* is beta (log p(answer) - log p_reference(answer)), where an answer is
its tokens that carry loss. The loss of a pair is -log sigmoid of its *margin*, the reward
of the chosen answer minus that of the rejected one (equation 7).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flaxlm.config import DpoConfig, TrainingConfig
from flaxlm.data.objectives import Batch
from flaxlm.nn.base import LanguageModel
from flaxlm.training.logprobs import (
  forward,
  learning_pass,
  reference_logprobs,
  target_logprobs,
)

LEAST_TOKENS = 4  # of a pair: its answers have a token each, and one before it
Sums = dict[str, jax.Array]


def preference_and_gradient(
  model: LanguageModel,
  cfg: TrainingConfig,
  dpo: DpoConfig,
  params: Any,
  batch: Batch,
  key: jax.Array,
  frozen: Any = None,
  reference: Any = None,
) -> tuple[Sums, Any]:
  """Sums over a batch's pairs (see `sums_of`), and the gradient of what is minimised.

  That is the loss with label smoothing. The experts' own losses are left out: they are
  means over tokens, and this is one over pairs. The reference has no gradient.
  """
  chunks = cfg.loss_chunks
  reference_BT = reference_logprobs(model, reference, batch, chunks)
  # The model's pass begins when the reference's is over. Side by side, as XLA would run
  # them, the logits of one lie in memory beside the activations of the other.
  tokens_BT, reference_BT = jax.lax.optimization_barrier((batch.tokens_BT, reference_BT))
  batch = batch._replace(tokens_BT=tokens_BT)

  def minimised(params: Any) -> tuple[jax.Array, Sums]:
    params, output = learning_pass(model, params, frozen, batch, key)
    logprobs_BT = target_logprobs(model, params, output.value, batch.targets_BT, chunks)
    return sums_of(dpo, logprobs_BT, reference_BT, batch)

  (_, sums), gradient = jax.value_and_grad(minimised, has_aux=True)(params)
  return sums, gradient


def eval_sums(
  model: LanguageModel, dpo: DpoConfig, params: Any, reference: Any, batch: Batch
) -> Sums:
  """Sums over a batch's pairs (see `sums_of`), how many there are, and how many tokens."""
  x_BTD = forward(model, params, batch, method="hidden").value
  logprobs_BT = target_logprobs(model, params, x_BTD, batch.targets_BT)
  reference_BT = reference_logprobs(model, reference, batch)
  _, sums = sums_of(dpo, logprobs_BT, reference_BT, batch)
  return sums | {"pairs": num_pairs(batch), "tokens": batch.weights_BT.sum()}


def sums_of(
  dpo: DpoConfig, logprobs_BT: jax.Array, reference_BT: jax.Array, batch: Batch
) -> tuple[jax.Array, Sums]:
  """(what is minimised, sums over pairs) from the log-probability of each target.

  The sums are of the loss without label smoothing, of both rewards, of their margin, and of
  the pairs whose chosen answer has the higher reward.
  """
  change_BT = (logprobs_BT - reference_BT) * batch.weights_BT
  rewards_BP2 = dpo.beta * by_answer(change_BT, batch)
  is_pair_BP = are_pairs(batch)
  chosen_BP, rejected_BP = rewards_BP2[..., 0], rewards_BP2[..., 1]
  margin_BP = chosen_BP - rejected_BP
  total = lambda x_BP: jnp.where(is_pair_BP, x_BP, 0.0).sum()
  loss, swapped = (total(jax.nn.softplus(x)) for x in (-margin_BP, margin_BP))
  sums = {
    "loss": loss,
    "accuracy": total(margin_BP > 0),
    "margin": total(margin_BP),
    "chosen_reward": total(chosen_BP),
    "rejected_reward": total(rejected_BP),
  }
  smoothing = dpo.label_smoothing
  return (1 - smoothing) * loss + smoothing * swapped, sums


def by_answer(x_BT: jax.Array, batch: Batch) -> jax.Array:
  """Sums over the tokens of each answer, (B, P, 2): of P pairs the chosen, the rejected.

  The documents of a row are its pairs, one after the other (`data.rows.PreferenceRows`).
  """
  B, T = x_BT.shape
  num_pairs = max(1, (T + 1) // LEAST_TOKENS)
  numbers_S = jnp.arange(1, 1 + 2 * num_pairs)
  is_in_BTS = jnp.asarray(batch.segments_BT)[..., None] == numbers_S
  # A masked sum, as in `losses.cross_entropy`.
  return jnp.where(is_in_BTS, x_BT[..., None], 0.0).sum(1).reshape(B, num_pairs, 2)


def are_pairs(batch: Batch) -> jax.Array:
  """Which of a row's places (B, P) have a pair."""
  return (by_answer(jnp.asarray(batch.weights_BT), batch) > 0).all(-1)


def num_pairs(batch: Batch) -> jax.Array:
  """How many pairs a batch has."""
  return are_pairs(batch).sum(dtype=jnp.float32)


def preference_figures(sums: Mapping[str, float]) -> dict[str, float]:
  """The figures of an evaluation: means over its pairs."""
  means = {name: value for name, value in sums.items() if name not in ("pairs", "tokens")}
  return {f"eval/{name}": value / sums["pairs"] for name, value in means.items()}
