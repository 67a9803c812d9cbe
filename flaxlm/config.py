# SPDX-License-Identifier: Apache-2.0
"""Every knob of flaxlm and, here alone, its default.

An experiment is a `Config`: frozen dataclasses, one per concern, with typed and bounded
fields, checked as a whole (`Config.check`, which reports every mistake at once). How one is
read and changed is in `configfile`. Standard library only: importing this is instant.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from flaxlm.errors import ConfigError

MESH_AXES = ("stage", "data", "fsdp", "context", "tensor", "expert")
SLOW = "@dcn"  # behind a size: the axis joins slices or hosts, over the data-centre network
MeshConfig = Mapping[str, int | str]

VOCAB_MULTIPLE = 64  # divides over a mesh and fills the vector units (nanoGPT's 50304)

# What each family of models is trained to predict.
OBJECTIVES = {
  "decoder": "next_token",
  "rnn": "next_token",
  "encoder": "masked",
  "encoder_decoder": "seq2seq",
}


def knob(
  default: Any, text: str, low: float | None = None, high: float | None = None
) -> Any:
  """A field with its help text and, for numbers, its inclusive bounds."""
  metadata = {"help": text, "low": low, "high": high}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Rotary positions (Su et al., 2021), and how they stretch past the trained context."""

  theta: float = knob(10_000.0, "base of the wavelengths", 1)
  local_theta: float | None = knob(
    None, "base in local layers, which then are never stretched; none = theta", 1
  )
  fraction: float = knob(
    1.0, "share of each head's dims that turns, the first ones, in pairs", 0, 1
  )
  scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = knob(
    "none",
    "how wavelengths stretch: all alike (linear), by a larger base (ntk), or by length",
  )
  factor: float = knob(1.0, "new context / original context", 1)
  original_context: int | None = knob(
    None, "context before stretching; none = context / factor", 1
  )
  slow_turns: float = knob(
    1.0,
    "yarn, llama3: pairs that turn less often over the original context stretch fully",
    0,
  )
  fast_turns: float = knob(
    32.0, "yarn (32), llama3 (4): pairs that turn more often do not stretch", 0
  )
  attention_factor: float | None = knob(
    None, "yarn: q and k are scaled by it; none = 0.1 ln(factor) + 1", 0
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
  """A mixture of experts (Shazeer et al., 2017) in place of each feed-forward."""

  num_experts: int = knob(0, "experts in a layer (E); 0 = one dense feed-forward", 0)
  experts_per_token: int = knob(2, "experts that a token visits (A)", 1)
  expert_width: int | None = knob(None, "an expert's width (F); none = ffn_width", 1)
  num_shared_experts: int = knob(0, "experts that every token visits besides", 0)
  shared_gated: bool = knob(False, "the shared experts' output is weighted by a sigmoid")
  normalized: bool = knob(True, "a token's weights add up to 1 over its chosen experts")
  capacity_factor: float | None = knob(
    None,
    "an expert's room / an even share, dropping the rest; none = nothing is dropped",
    0,
  )
  load_balance_weight: float = knob(0.01, "of the loss for uneven use of experts", 0)
  router_z_weight: float = knob(0.001, "of the loss for large router logits", 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The architecture: what the parameters are, and nothing about how they run."""

  family: Literal["decoder", "encoder", "encoder_decoder", "rnn"] = knob(
    "decoder", "kind of model"
  )
  depth: int = knob(4, "number of blocks (L); encoder_decoder: of the decoder", 1)
  encoder_depth: int | None = knob(
    None, "encoder_decoder: blocks of the encoder; none = depth", 1
  )
  width: int = knob(128, "model width (D)", 1)
  num_heads: int = knob(4, "query heads (N)", 1)
  num_kv_heads: int | None = knob(None, "key/value heads (K); none = num_heads", 1)
  head_dim: int | None = knob(None, "head dim (H); none = width / num_heads", 1)
  ffn_width: int | None = knob(
    None, "feed-forward width (F); none = 4 D, or 8/3 D when gated", 1
  )
  vocab_size: int | None = knob(
    None, "vocabulary (V); none = the tokenizer's, rounded up to a multiple of 64", 2
  )
  num_ids: int | None = knob(
    None, "ids that stand for tokens: rows of V after them are padding; none = all", 2
  )
  context: int = knob(256, "longest sequence the model takes, in tokens", 1)
  cell: Literal["lstm", "gru"] = knob("lstm", "rnn: what its layers are made of")
  # -- Positions
  positions: Literal["rope", "learned", "sinusoidal", "alibi", "relative", "none"] = knob(
    "rope", "positional encoding; relative is T5's bias by bucketed distance"
  )
  rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
  relative_buckets: int = knob(32, "relative: number of distances told apart", 4)
  relative_distance: int = knob(128, "relative: from here on all distances are one", 2)
  # -- Normalisation and residual stream
  norm: Literal["rmsnorm", "layernorm"] = knob("rmsnorm", "normalisation")
  norm_placement: Literal["pre", "post", "output", "both"] = knob(
    "pre", "x + f(norm x) | norm(x + f x) | x + norm(f x) | x + norm(f(norm x))"
  )
  norm_biased: bool = knob(True, "layernorm: adds a bias")
  norm_epsilon: float = knob(1e-6, "added to the variance", 0)
  parallel: Literal["none", "one_norm", "two_norms"] = knob(
    "none", "attention and feed-forward side by side, behind one norm or two"
  )
  embedding_norm: bool = knob(False, "a norm right after the embedding")
  embedding_scaled: bool = knob(False, "embedded tokens times sqrt(width)")
  dropout: float = knob(0.0, "rate on embeddings and residual branches", 0, 0.999)
  # -- Attention
  window: int | None = knob(None, "sliding window of local layers, in tokens", 1)
  layer_pattern: str | None = knob(
    None,
    "repeated over depth: L local, G global, as LLLLLG; none = L with a window, else G",
  )
  sink_tokens: int = knob(0, "first tokens of a text that local layers always see", 0)
  learned_sinks: bool = knob(False, "a trained logit per head that takes weight from keys")
  attention_scale: float | None = knob(None, "of q . k; none = 1 / sqrt(head_dim)", 0)
  attention_softcap: float | None = knob(None, "c: scores become c tanh(score / c)", 1e-6)
  qk_norm: Literal["none", "head", "width"] = knob(
    "none", "RMSNorm of queries and keys, of each head or over all heads at once"
  )
  # -- Feed-forward and biases
  activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = knob(
    "silu", "feed-forward nonlinearity"
  )
  gated: bool = knob(True, "gated feed-forward (SwiGLU with silu, GEGLU with gelu)")
  moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
  biased: bool = knob(
    False, "biases in the projections and the feed-forward, but for experts"
  )
  qkv_biased: bool | None = knob(None, "biases of queries, keys, values; none = as biased")
  o_biased: bool | None = knob(None, "bias of attention's output; none = as biased")
  # -- Head
  tied_embeddings: bool = knob(True, "the head is the embedding, transposed")
  head_biased: bool = knob(False, "a bias per token of the vocabulary")
  head_transform: bool = knob(False, "dense, activation, norm before the head (BERT)")
  logit_scale: float = knob(1.0, "logits are multiplied by it", 1e-9)
  logit_softcap: float | None = knob(None, "c: logits become c tanh(logit / c)", 1e-6)
  num_token_types: int = knob(0, "encoder: kinds of segments told apart (BERT: 2)", 0)
  pooler: bool = knob(False, "encoder: dense and tanh over the first token (BERT)")

  @property
  def period(self) -> str:
    """The kinds of layers, L and G, that repeat over the depth."""
    return self.layer_pattern or ("G" if self.window is None else "L")

  @property
  def unpadded(self) -> "ModelConfig":
    """The same without padding: every row of the vocabulary stands for a token."""
    if self.num_ids is None:
      return self
    return dataclasses.replace(self, vocab_size=self.num_ids, num_ids=None)

  def padded(self, parts: int) -> "ModelConfig":
    """The same, its vocabulary padded if so many devices cannot share it out evenly."""
    num_ids = self.unpadded.vocab_size
    if num_ids is None or self.vocab_size is None or self.vocab_size % parts == 0:
      return self
    multiple = math.lcm(VOCAB_MULTIPLE, parts)
    rows = multiple * math.ceil(num_ids / multiple)
    return dataclasses.replace(self, vocab_size=rows, num_ids=num_ids)

  @property
  def padding(self) -> str:
    """What people are told of a padded vocabulary; "" for one that is not."""
    if self.num_ids is None:
      return ""
    return (
      f"vocabulary: {self.num_ids:,} ids, padded to {self.vocab_size:,} rows; the padding "
      "gets no probability"
    )

  def resolve(self, tokenizer_size: int | None = None) -> "ModelConfig":
    """Fills every `None` that has a rule, so that the modules see numbers only."""
    vocab_size, num_ids = self.vocab_size, self.num_ids
    if vocab_size is None and tokenizer_size is not None:
      vocab_size = VOCAB_MULTIPLE * math.ceil(tokenizer_size / VOCAB_MULTIPLE)
      num_ids = None if vocab_size == tokenizer_size else tokenizer_size
    ffn_width = 4 * self.width
    if self.gated:  # three matrices for two: 8/3 D keeps the parameters (Shazeer, 2020)
      multiple = 256 if self.width >= 1024 else 32  # LLaMA's; others are padded on GPUs
      ffn_width = multiple * math.ceil(8 * self.width / 3 / multiple)
    ffn_width = self.ffn_width or ffn_width
    head_dim = self.head_dim or self.width // self.num_heads
    rope = dataclasses.replace(
      self.rope,
      original_context=self.rope.original_context or int(self.context / self.rope.factor),
    )
    expert_width = self.moe.expert_width or ffn_width
    return dataclasses.replace(
      self,
      encoder_depth=self.encoder_depth or self.depth,
      num_kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=head_dim,
      ffn_width=ffn_width,
      vocab_size=vocab_size,
      num_ids=num_ids,
      rope=rope,
      attention_scale=self.attention_scale or head_dim**-0.5,
      moe=dataclasses.replace(self.moe, expert_width=expert_width),
      qkv_biased=self.biased if self.qkv_biased is None else self.qkv_biased,
      o_biased=self.biased if self.o_biased is None else self.o_biased,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """How text becomes ids."""

  kind: Literal["byte", "bpe"] = knob("bpe", "byte: 256 ids; bpe: trained byte-level BPE")
  vocab_size: int = knob(4096, "ids of a trained tokenizer, specials included", 257)
  path: str | None = knob(None, "a tokenizer.json to use instead of training one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What is read, and how it is cut into batches."""

  corpus: str = knob("stdlib", "stdlib | files:GLOB | tfds:NAME[/CONFIG] | gettext:LANG")
  objective: Literal["next_token", "masked", "seq2seq"] = knob(
    "next_token", "predicted: what follows, what was masked, or the other half of a pair"
  )
  mask_fraction: float = knob(0.15, "masked: share of tokens to predict", 0.001, 0.999)
  seq_len: int = knob(256, "tokens in a row of a batch (T)", 1)
  source_len: int | None = knob(
    None, "seq2seq: source tokens in a row (S); none = seq_len", 1
  )
  batch_size: int = knob(16, "rows in a batch (B), over all devices", 1)
  num_epochs: int | None = knob(None, "passes over the corpus; none = no end", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The update rule and its schedule."""

  kind: Literal["adamw", "lion", "adafactor", "muon", "sgd"] = knob("adamw", "update rule")
  learning_rate: float = knob(1e-3, "peak learning rate", 0)
  schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = knob(
    "cosine", "shape after the warm-up"
  )
  warmup_steps: int = knob(50, "steps of linear warm-up from 0", 0)
  final_fraction: float = knob(0.1, "cosine, linear: last rate / peak rate", 0, 1)
  weight_decay: float = knob(0.1, "decoupled decay, on matrices only", 0)
  beta1: float = knob(0.9, "decay of the first moment (sgd: momentum)", 0, 1)
  beta2: float = knob(0.95, "decay of the second moment", 0, 1)
  epsilon: float = knob(1e-8, "added to the denominator", 0)
  sharded: bool = knob(False, "cut moments over mesh axis data too (ZeRO-1)")
  clip_norm: float | None = knob(1.0, "global gradient norm; none = no clipping", 0)


Remat = Literal["none", "dots", "attention", "full", "offload"]
AttentionPath = Literal["auto", "blocked", "cudnn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """How long, how often, and how the model runs; never what its parameters are."""

  num_steps: int = knob(1000, "optimizer steps", 0)
  accumulation_steps: int = knob(1, "micro-batches per step; they divide batch_size", 1)
  log_every_steps: int = knob(10, "steps per line of metrics", 1)
  eval_every_steps: int = knob(250, "steps between evaluations", 1)
  eval_batches: int | None = knob(None, "batches per evaluation; none = whole split", 1)
  label_smoothing: float = knob(
    0.0, "share of the target spread over the vocabulary (Szegedy et al., 2016)", 0, 0.999
  )
  dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of the computation")
  param_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of parameters")
  attention: AttentionPath = knob(  # noqa: RUF009 - as frozen as the others
    "auto",
    "over whole rows; blocked: in XLA's operations; cudnn: NVIDIA's fused kernel, in "
    "bfloat16 on its GPUs; auto: cudnn where it can do what the model asks",
  )
  remat: Remat = knob(  # noqa: RUF009 - as frozen as the others
    "none",
    "kept of a block for the backward pass besides its input: all; dots: products with "
    "weights; attention: its output; full: nothing; offload: attention's, in host memory",
  )
  loss_chunks: int = knob(1, "parts of a row whose logits are computed one by one", 1)
  scanned: bool = knob(
    False, "one compiled block looped over (compiles faster, runs slower)"
  )
  pipeline_microbatches: int | None = knob(
    None, "mesh axis stage: parts in which a batch passes; none = as many as stages", 1
  )
  pipeline_repeats: int = knob(
    1, "mesh axis stage: times that each part goes round; a shorter wait, more hops", 1
  )
  sequence_parallel: bool = knob(
    False, "mesh axis tensor: norms and sums on a share of the row each; less memory"
  )
  replication_tolerance: float = knob(
    0.1, "most of the parameters' bytes that a mesh may leave whole on every device", 0, 1
  )
  sample_prompt: str = knob("", "continued for you when training ends")
  hang_seconds: float | None = knob(
    600.0, "a step that takes longer ends the run, with a stack; none = never", 0.1
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """What is stored, and what a second start does with it."""

  every_steps: int = knob(500, "steps between checkpoints; the last is always kept", 1)
  keep: int = knob(2, "newest checkpoints kept", 1)
  resume: Literal["auto", "must", "never"] = knob(
    "auto", "auto: go on if there is a checkpoint; must: or fail; never: start over"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
  """Several processes that train together; who they are, the environment says."""

  start_seconds: float = knob(300.0, "wait so long for all processes at the start", 0.1)
  heartbeat_seconds: float = knob(60.0, "a process silent for so long is lost", 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One experiment."""

  name: str | None = knob(None, "run name; none = the config file's name")
  seed: int = knob(0, "of parameters, data order and dropout", 0, 2**31 - 1)
  runs_dir: str = knob("runs", "where run directories go")
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  job: JobConfig = dataclasses.field(default_factory=JobConfig)
  mesh: Mapping[str, int | str] = knob(
    {"data": -1},
    "devices per mesh axis, as data=2,fsdp=4; one may be -1 (the rest); data=2@dcn, in a "
    "file '2@dcn': the axis is the slow network between slices or hosts",
  )
  simulated_devices: int | None = knob(None, "CPU only: pretend to have this many", 1, 4096)

  @property
  def run_dir(self) -> Path:
    assert self.name is not None, "load_config names the run"
    return Path(self.runs_dir) / self.name

  def check(self) -> None:
    """Raises one `ConfigError` that lists every mistake."""
    mistakes = list(_wrong_types(self))
    if not mistakes:  # what follows compares and divides
      mistakes = [*_out_of_bounds(self), *_contradictions(self)]
    if mistakes:
      cures = [cure for _, cure in mistakes if cure]
      raise ConfigError("; ".join(cause for cause, _ in mistakes), "; ".join(cures))


def _wrong_types(cfg: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """(cause, cure) of every value that its field cannot hold: Python files are not typed."""
  for name, kind in typing.get_type_hints(type(cfg)).items():
    value = getattr(cfg, name)
    if dataclasses.is_dataclass(kind) and type(value) is kind:
      yield from _wrong_types(value, f"{prefix}{name}.")
    elif not is_a(kind, value):
      choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
      wanted = ", ".join(choices) or getattr(kind, "__name__", str(kind))
      yield f"{prefix}{name} is {value!r}", f"{prefix}{name} can be {wanted}"


def is_a(kind: Any, value: Any) -> bool:
  """Whether a field of type `kind` can hold `value`."""
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    return any(is_a(argument, value) for argument in arguments)
  if origin is Literal:
    return value in arguments
  if origin is Mapping:
    return isinstance(value, dict) and all(type(n) in (int, str) for n in value.values())
  if kind is float:
    return type(value) in (int, float)
  return type(value) is kind


def _out_of_bounds(cfg: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
  """(cause, cure) of every number outside its field's bounds."""
  for field in dataclasses.fields(cfg):
    value, name = getattr(cfg, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from _out_of_bounds(value, f"{name}.")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
      low, high = field.metadata.get("low"), field.metadata.get("high")
      too_low = low is not None and value < low
      is_float = isinstance(value, float)
      unusable = not math.isfinite(value) if is_float else abs(value) >= 2**63
      if unusable or too_low or (high is not None and value > high):
        allowed = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        yield f"{name} is {value}", f"{name} can be {allowed}"


def _contradictions(cfg: Config) -> Iterator[tuple[str, str]]:
  """(cause, cure) of every pair of fields that cannot go together: the only such list."""
  yield from _model_contradictions(cfg.model)
  objective = OBJECTIVES[cfg.model.family]
  if cfg.data.objective != objective:
    yield (
      f"model.family={cfg.model.family} does not learn data.objective={cfg.data.objective}",
      f"set --data.objective={objective}",
    )
  if cfg.data.seq_len > cfg.model.context:
    yield (
      f"data.seq_len={cfg.data.seq_len} is longer than model.context={cfg.model.context}",
      f"set --model.context={cfg.data.seq_len} or --data.seq_len={cfg.model.context}",
    )
  if cfg.data.source_len is not None and cfg.data.source_len > cfg.model.context:
    yield (
      f"data.source_len={cfg.data.source_len} is longer than "
      f"model.context={cfg.model.context}",
      f"set --model.context={cfg.data.source_len}",
    )
  if cfg.training.accumulation_steps > 0 and (
    cfg.data.batch_size % cfg.training.accumulation_steps
  ):
    yield (
      f"data.batch_size={cfg.data.batch_size} is not a multiple of "
      f"training.accumulation_steps={cfg.training.accumulation_steps}",
      "",
    )
  if cfg.training.loss_chunks > 0 and cfg.data.seq_len % cfg.training.loss_chunks:
    yield (
      f"data.seq_len={cfg.data.seq_len} is not a multiple of "
      f"training.loss_chunks={cfg.training.loss_chunks}",
      "",
    )
  if str(cfg.mesh.get("context", 1)) != "1" and cfg.model.family == "rnn":
    yield "an RNN reads its row in order: mesh axis context has no use", "leave it out"
  if cfg.name is not None and (
    Path(cfg.name).name != cfg.name or cfg.name in ("", ".", "..")
  ):
    yield (
      f"name={cfg.name!r} is not a plain directory name",
      "use letters, digits, - and _",
    )
  yield from mesh_mistakes(cfg.mesh)


def _model_contradictions(model: ModelConfig) -> Iterator[tuple[str, str]]:
  yield from _head_contradictions(model)
  yield from _vocabulary_contradictions(model)
  if model.positions == "sinusoidal" and model.width % 2:
    yield f"sinusoidal positions need an even model.width, not {model.width}", ""
  if model.layer_pattern is not None and not set(model.layer_pattern) <= {"L", "G"}:
    yield f"model.layer_pattern={model.layer_pattern!r}", "it is made of L and G, as LLLLLG"
  if model.layer_pattern == "":
    yield "model.layer_pattern is empty", "leave it out: none"
  if "L" in (model.layer_pattern or "") and model.window is None:
    yield (
      "model.layer_pattern has local layers, but there is no window",
      "set --model.window",
    )
  rope = model.rope
  if rope.scaling in ("yarn", "llama3") and rope.fast_turns <= rope.slow_turns:
    yield (
      f"model.rope.fast_turns={rope.fast_turns} is not more than "
      f"model.rope.slow_turns={rope.slow_turns}",
      "llama3 has 4 and 1, yarn 32 and 1",
    )
  if model.parallel != "none" and model.norm_placement != "pre":
    yield (
      f"model.parallel={model.parallel} with model.norm_placement={model.norm_placement}",
      "side by side they have their norms in front: --model.norm_placement=pre",
    )
  if model.moe.experts_per_token > model.moe.num_experts > 0:
    yield (
      f"model.moe.experts_per_token={model.moe.experts_per_token} is more than "
      f"model.moe.num_experts={model.moe.num_experts}",
      f"model.moe.experts_per_token can be 1 to {model.moe.num_experts}",
    )
  if model.family == "rnn":
    default = ModelConfig()
    for name in ("moe", "parallel", "norm_placement", "embedding_norm", "layer_pattern"):
      if getattr(model, name) != getattr(default, name):
        yield f"model.{name} is a transformer's", "leave it out: model.family=rnn"
  if model.family != "encoder" and (model.num_token_types or model.pooler):
    yield "model.num_token_types and model.pooler are an encoder's", ""


def _vocabulary_contradictions(model: ModelConfig) -> Iterator[tuple[str, str]]:
  if model.num_ids is not None and model.num_ids > (model.vocab_size or 0):
    yield (
      f"model.num_ids={model.num_ids} is more than model.vocab_size={model.vocab_size}",
      "it is for a vocabulary with padding: leave it out",
    )


def _head_contradictions(model: ModelConfig) -> Iterator[tuple[str, str]]:
  if model.head_dim is None and model.num_heads > 0 and model.width % model.num_heads:
    unit = model.num_heads * (2 if model.positions == "rope" else 1)  # RoPE takes pairs
    yield (
      f"model.width={model.width} is not a multiple of model.num_heads={model.num_heads}",
      f"nearest width: {_nearest_multiple(model.width, unit)}, or set model.head_dim",
    )
  kv_heads = model.num_kv_heads or model.num_heads
  if kv_heads > 0 and model.num_heads % kv_heads:
    divisors = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
    yield (
      f"model.num_kv_heads={kv_heads} does not divide model.num_heads={model.num_heads}",
      f"model.num_kv_heads can be {', '.join(map(str, divisors))}",
    )
  head_dim = model.head_dim or model.width // max(1, model.num_heads)
  if model.positions == "rope" and head_dim % 2:
    yield f"RoPE rotates pairs, but the head dim is {head_dim}", "make it even"


def _nearest_multiple(number: int, of: int) -> int:
  return of * max(1, (2 * number + of) // (2 * of))


def mesh_mistakes(mesh: MeshConfig) -> Iterator[tuple[str, str]]:
  """(cause, cure) of every unusable entry of a mesh."""
  sizes = []
  for axis, entry in mesh.items():
    text = str(entry).removesuffix(SLOW)
    if axis not in MESH_AXES:
      yield f"unknown mesh axis {axis!r}", f"mesh axes are {', '.join(MESH_AXES)}"
    elif not re.fullmatch(r"-?\d+", text):
      yield f"mesh axis {axis}={entry}", "a size is a whole number, or one as in 2@dcn"
    elif int(text) < 1 and int(text) != -1:
      yield f"mesh axis {axis}={entry}", "a size is at least 1, or -1 for the rest"
    sizes.append(text)
  if sizes.count("-1") > 1:
    yield "more than one mesh axis is -1", "only one axis can take the rest"


def mesh_sizes(mesh: MeshConfig) -> dict[str, int]:
  """Devices along each axis that a mesh names, on whichever network it lies."""
  return {axis: int(str(size).removesuffix(SLOW)) for axis, size in mesh.items()}


def slow_axes(mesh: MeshConfig) -> tuple[str, ...]:
  """The axes that a mesh lays on the network between slices or hosts, in mesh order."""
  return tuple(axis for axis in MESH_AXES if str(mesh.get(axis, 1)).endswith(SLOW))
