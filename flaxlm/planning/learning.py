# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on paper: what learns, what is frozen, and what that saves; and whether the
data come as fast as they are learnt from."""

import dataclasses
from typing import Any

from flaxlm.config import LoraConfig
from flaxlm.cost import adapter_parameters
from flaxlm.planning.roofline import Plan, plan_training
from flaxlm.planning.tables import Rows, duration, size


@dataclasses.dataclass(frozen=True)
class Learning:
  """What a step of fine-tuning changes of a model, and what it only reads."""

  trained: int  # parameters
  frozen: int  # of the base, without gradient or moments
  base_dtype: str  # of the frozen matrices
  reference: str | None  # what answers are compared with
  whole: Plan | None  # if all parameters learned in place of adapters


def find_learning(plan: Plan) -> Learning | None:
  """What learns by a plan with adapters or a reference; None where everything does."""
  cfg, total = plan.cfg, sum(plan.parameters.values())
  adapters = adapter_parameters(cfg.model, cfg.lora)
  reference = None
  if cfg.reference_passes:
    reference = "the same, adapters off" if adapters else "a frozen copy of all parameters"
  if not adapters and reference is None:
    return None
  whole = dataclasses.replace(cfg, lora=LoraConfig())
  narrow = cfg.lora.base_weights == "int8"
  return Learning(
    trained=adapters or total,
    frozen=total if adapters else 0,
    base_dtype="int8" if narrow else cfg.training.param_dtype,
    reference=reference,
    whole=plan_training(whole, plan.sizes, plan.device) if adapters else None,
  )


def learning_rows(learning: Learning) -> Rows:
  yield "trained", f"{learning.trained:,} parameters, with gradient and moments"
  if learning.frozen:
    what = f"{learning.frozen:,} parameters in {learning.base_dtype}"
    yield "frozen", f"{what}, without gradient or moments"
  if learning.reference:
    yield "reference, forward alone", learning.reference
  if learning.whole is not None:
    text = f"{size(learning.whole.memory.total)} per device"
    if (seconds := learning.whole.times.seconds) is not None:
      text += f", a step of {duration(seconds)}"
    yield "if all parameters learned", text


def learning_json(learning: Learning) -> dict[str, Any]:
  found: dict[str, Any] = {"trained": learning.trained, "frozen": learning.frozen}
  found |= {"base_dtype": learning.base_dtype, "reference": learning.reference}
  whole = learning.whole
  return found | {
    "whole": whole
    and {"total_bytes": whole.memory.total, "step_seconds": whole.times.seconds}
  }


# -- The data ------------------------------------------------------------------------------


def data_seconds(plan: Plan, rate: float | None) -> float | None:
  """The time to make a step's rows, at a rate of tokens per second; None: not known."""
  return rate and plan.cost.tokens / rate


def data_wait(plan: Plan, rate: float | None) -> float:
  """The share of the time in which steps wait for their rows; 0 if that is not known."""
  seconds, step = data_seconds(plan, rate), plan.times.seconds
  return 0.0 if seconds is None or step is None else max(0.0, 1 - step / seconds)


def data_note(plan: Plan, rate: float | None) -> str:
  """Whether a step would wait for its rows, in a few words."""
  seconds, waiting = data_seconds(plan, rate), data_wait(plan, rate)
  if seconds is None:
    return "not known: --data-tokens-per-second"
  if not waiting:
    return duration(seconds)
  return f"{duration(seconds)}: THE STEP WAITS FOR THEM {waiting:.0%} of the time"
