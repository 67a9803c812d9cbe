# SPDX-License-Identifier: Apache-2.0
"""An experiment is a `Config`: frozen dataclasses, one per concern.

Every default is set here or, for the architecture, in `config.model`, and nowhere else.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from flaxlm.config.fields import (
  MOST_DEVICES,
  MOST_IDS,
  MOST_LAYERS,
  MOST_ROWS,
  MOST_SECONDS,
  MOST_STEPS,
  MOST_TOKENS,
  MOST_WIDTH,
  fields_of,
  knob,
)
from flaxlm.config.model import ModelConfig, ResolvedModel

TokenizerKind = Literal["byte", "char", "word", "bpe", "wordpiece", "unigram"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """How text becomes ids."""

  kind: TokenizerKind = knob(  # noqa: RUF009 - as frozen as the others
    "bpe",
    "method: byte (256 ids); char; word (others are unknown); bpe, wordpiece, unigram "
    "(pieces of words, down to bytes)",
  )
  vocab_size: int = knob(
    4096, "ids of a trained tokenizer, at most, specials included", 257, MOST_IDS
  )
  path: str | None = knob(
    None, "a tokenizer.json or SentencePiece model to use instead of training one"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What is read, and how it is split into batches."""

  corpus: str = knob(
    "stdlib",
    "stdlib | files:GLOB | tfds:NAME[/CONFIG][:VERSION] | gettext:LANG, or several with "
    "their shares of tokens: '0.7 stdlib + 0.3 files:GLOB'",
  )
  objective: Literal["next_token", "masked", "seq2seq", "chat", "preference", "reward"] = (
    knob(
      "next_token",
      "what is predicted: the next token, masked tokens, a pair's target, or what the "
      "assistant says in a chat; preference: which of two answers is the better one (DPO); "
      "reward: what is drawn and found good (GRPO)",
    )
  )
  text_field: str = knob("text", "the field of .jsonl and .parquet files that is read")
  deduplicate: Literal["none", "exact", "near"] = knob(
    "none",
    "documents that are left out: those whose text is there already, or (near, by MinHash) "
    "most of it",
  )
  mask_fraction: float = knob(0.15, "masked: share of tokens to predict", 0.001, 0.999)
  seq_len: int = knob(256, "tokens in a row of a batch (T)", 1, MOST_TOKENS)
  source_len: int | None = knob(
    None, "seq2seq: source tokens in a row (S); none = seq_len", 1, MOST_TOKENS
  )
  batch_size: int = knob(16, "rows in a batch (B), across all devices", 1, MOST_ROWS)
  num_epochs: int | None = knob(
    None,
    "passes over the corpus (a mixture: over what ends first); none = no end",
    1,
    MOST_STEPS,
  )

  @property
  def source_length(self) -> int:
    """Source tokens in a row of pairs (S)."""
    return self.source_len or self.seq_len


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The update rule and its schedule."""

  kind: Literal["adamw", "lion", "adafactor", "muon", "sgd"] = knob("adamw", "update rule")
  learning_rate: float = knob(1e-3, "peak learning rate", 0)
  schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = knob(
    "cosine", "shape after the warm-up"
  )
  warmup_steps: int = knob(50, "steps of linear warm-up from 0", 0, MOST_STEPS)
  final_fraction: float = knob(0.1, "cosine, linear: last rate / peak rate", 0, 1)
  weight_decay: float = knob(0.1, "decoupled weight decay, of matrices only", 0)
  beta1: float = knob(0.9, "decay of the first moment (sgd: momentum)", 0, 1)
  beta2: float = knob(0.95, "decay of the second moment", 0, 1)
  epsilon: float = knob(1e-8, "added to the denominator", 0)
  sharded: bool = knob(False, "shard moments over mesh axis data too (ZeRO-1)")
  clip_norm: float | None = knob(1.0, "largest gradient norm; none = no clipping", 0)


Remat = Literal["none", "dots", "attention", "full", "offload"]

AttentionPath = Literal["auto", "blocked", "cudnn", "splash", "tiled"]

MatmulKind = Literal["full", "int8", "fp8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """How long training takes, what happens when, and how the model runs; no architecture."""

  num_steps: int = knob(1000, "optimizer steps", 0, MOST_STEPS)
  accumulation_steps: int = knob(
    1, "micro-batches per step; they divide batch_size", 1, MOST_ROWS
  )
  log_every_steps: int = knob(10, "steps per line of metrics", 1, MOST_STEPS)
  eval_every_steps: int = knob(250, "steps between evaluations", 1, MOST_STEPS)
  eval_batches: int | None = knob(
    None, "batches per evaluation (of each source); none = whole split", 1, MOST_STEPS
  )
  label_smoothing: float = knob(
    0.0, "share of the target spread over the vocabulary (Szegedy et al., 2016)", 0, 0.999
  )
  dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of the computation")
  param_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of parameters")
  matmul: MatmulKind = knob(  # noqa: RUF009 - as frozen as the others
    "full",
    "products of a block's projections in training; full: in dtype; int8: of int8 numbers, "
    "one scale for each token and each output, but for the gradients of weights; fp8: of "
    "8-bit floats, one scale for each array, on NVIDIA GPUs from Ada on",
  )
  attention: AttentionPath = knob(  # noqa: RUF009 - as frozen as the others
    "auto",
    "kernel for whole rows; blocked: XLA's operations; cudnn: NVIDIA's fused kernel, in "
    "bfloat16 on its GPUs; splash: jax's fused kernel for TPUs; tiled: head by head, on a "
    "CPU; auto: the device's own where it supports the model, splash from 1,024 tokens a "
    "row on, tiled from 512",
  )
  remat: Remat = knob(  # noqa: RUF009 - as frozen as the others
    "none",
    "what a block keeps for the backward pass besides its input; none: everything; dots: "
    "products with weights; attention: attention's output; full: nothing; offload: "
    "attention's output, in host memory",
  )
  loss_chunks: int = knob(
    1, "parts of a row whose logits are computed one by one", 1, MOST_TOKENS
  )
  scanned: bool = knob(False, "loop over one compiled block (compiles faster, runs slower)")
  pipeline_microbatches: int | None = knob(
    None, "mesh axis stage: microbatches per batch; none = as many as stages", 1, MOST_ROWS
  )
  pipeline_repeats: int = knob(
    1,
    "mesh axis stage: rounds of each microbatch; more: less idle time, more transfers",
    1,
    MOST_LAYERS,
  )
  sequence_parallel: bool = knob(
    False, "mesh axis tensor: split rows in norms and residual sums; less memory"
  )
  replication_tolerance: float = knob(
    0.1, "largest share of the parameters' bytes that may be whole on every device", 0, 1
  )
  log_layers: bool = knob(
    False,
    "log each layer's gradient norm and update size and, in evaluations, the load of each "
    "expert",
  )
  sample_prompt: str = knob("", "prompt that is completed when training ends")
  sample_every_steps: int | None = knob(
    None, "steps between samples before the end; none = only one, then", 1, MOST_STEPS
  )
  hang_seconds: float | None = knob(
    600.0,
    "a step that takes longer ends the run, with a stack trace; none = never",
    0.1,
    MOST_SECONDS,
  )

  @property
  def item_size(self) -> int:
    """Bytes of a number of the computation."""
    return {"float32": 4, "bfloat16": 2}[self.dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Low-rank adapters (Hu et al., 2021): what learns in place of the parameters."""

  rank: int = knob(
    0, "rank of adapters, which learn in place of all else; 0 = none", 0, MOST_WIDTH
  )
  alpha: float = knob(16.0, "the adapters' change is multiplied by alpha / rank", 1e-6)
  targets: str = knob(
    "/(q|k|v|o|gate|up|down)$",
    "a regular expression: the projections that are adapted, as blocks/attention/q",
  )
  dropout: float = knob(0.0, "rate on the input of an adapter", 0, 0.999)
  base_weights: Literal["full", "int8"] = knob(
    "full", "how the projections of the base are kept while the adapters learn"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig:
  """Direct preference optimisation (Rafailov et al., 2023): data.objective=preference."""

  beta: float = knob(
    0.1, "how much a change of log-probabilities counts: larger stays closer", 1e-6
  )
  label_smoothing: float = knob(
    0.0, "the chance that a pair is the wrong way round (Mitchell, 2023)", 0, 0.499
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
  """Learning from rewards (data.objective=reward): what is drawn, and what judges it."""

  function: str = knob(
    "exact", "exact: 1 for the known answer, else 0; or a Python function, FILE.py:NAME"
  )
  num_samples: int = knob(
    8, "completions of each prompt, a group; they divide batch_size", 2, MOST_ROWS
  )
  max_new_tokens: int = knob(64, "longest completion, in tokens", 1, MOST_TOKENS)
  temperature: float = knob(1.0, "of what is drawn; 1: the model's own distribution", 1e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """What is stored, and whether a restarted run resumes from it."""

  every_steps: int = knob(
    500, "steps between checkpoints; the last is always kept", 1, MOST_STEPS
  )
  keep: int = knob(2, "newest checkpoints kept", 1, MOST_STEPS)
  resume: Literal["auto", "must", "never"] = knob(
    "auto", "auto: resume if there is a checkpoint; must: or fail; never: start over"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
  """Several processes that train together; the environment says which they are."""

  start_seconds: float = knob(
    300.0, "longest wait for all processes at the start", 0.1, MOST_SECONDS
  )
  heartbeat_seconds: float = knob(
    60.0, "a process silent for longer counts as lost", 1, MOST_SECONDS
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One experiment."""

  name: str | None = knob(None, "run name; none = the config file's name")
  seed: int = knob(0, "of parameters, data order and dropout", 0, 2**31 - 1)
  runs_dir: str = knob("runs", "where run directories go")
  track: Literal["none", "wandb", "trackio", "mlflow"] = knob(
    "none", "where metrics are sent besides the run's own files and TensorBoard"
  )
  track_project: str | None = knob(
    None, "track: project (mlflow: experiment); none = its own variable's, or flaxlm"
  )
  init: str | None = knob(
    None, "a run to begin from: its parameters, architecture and tokenizer"
  )
  init_optimizer: bool = knob(False, "init: with the state of its optimizer, too")
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
  dpo: DpoConfig = dataclasses.field(default_factory=DpoConfig)
  reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  job: JobConfig = dataclasses.field(default_factory=JobConfig)
  mesh: Mapping[str, int | str] = knob(
    {"data": -1},
    "devices per mesh axis, as in data=2,fsdp=4; one may be -1 (the rest); data=2@dcn (in "
    "a file '2@dcn') puts the axis on the slow network between slices or hosts",
  )
  simulated_devices: int | None = knob(
    None, "CPU only: pretend to have this many", 1, MOST_DEVICES
  )

  @property
  def run_dir(self) -> Path:
    assert self.name is not None, "load_config names the run"
    return Path(self.runs_dir) / self.name

  @property
  def active_dpo(self) -> DpoConfig | None:
    """`dpo`, if preferences are learnt."""
    return self.dpo if self.data.objective == "preference" else None

  @property
  def reference_passes(self) -> int:
    """How often a step also runs the parameters forward that the run began from."""
    return int(self.active_dpo is not None)

  @property
  def source_length(self) -> int:
    """Tokens in a row (S) that an encoder-decoder reads; 0 for other families."""
    return self.data.source_length if self.model.family == "encoder_decoder" else 0

  def resolve(self, tokenizer_size: int | None = None) -> "ResolvedConfig":
    """The same experiment with every number of its model known; see `ResolvedModel`."""
    return ResolvedConfig(
      **fields_of(self) | dict(model=self.model.resolve(tokenizer_size))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Config):
  """An experiment whose model is resolved: what a run directory keeps."""

  model: ResolvedModel
