# SPDX-License-Identifier: Apache-2.0
"""The references themselves equal other people's code and follow the papers.

With PyTorch and transformers (`-m parity`): a tiny random model of each family, in float64;
`reference_families` maps its weights to our parameter tree.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference_families as families
import reference_positions
import references
from reference_layers import visible

from flaxlm.config import ModelConfig, MoEConfig, RopeConfig

# -- Equal to transformers -------------------------------------------------------------


class Family(NamedTuple):
  """A tiny model of another package, our config of it, and the map between them."""

  name: str
  theirs: dict
  ours: dict
  params: Callable[[families.State, ModelConfig], dict] = families.llama
  tolerance: float = 1e-9


# LLaMA's names of the sizes, the older ones, and ours.
SIZES = dict(
  hidden_size=32,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=24,
  num_hidden_layers=2,
  vocab_size=32,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  pad_token_id=None,
)
GPT_SIZES = dict(n_embd=32, n_head=4, n_inner=24, n_layer=2, n_positions=64, vocab_size=32)
OURS = dict(
  width=32,
  num_heads=4,
  num_kv_heads=2,
  ffn_width=24,
  depth=2,
  vocab_size=32,
  context=64,
  norm_epsilon=1e-5,
  tied_embeddings=False,
)
MHA = dict(num_kv_heads=None)
GPT = dict(norm="layernorm", gated=False, biased=True, activation="gelu_tanh") | MHA
TIED = dict(tied_embeddings=True)


def rope(kind: str, **kwargs) -> dict:
  return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0} | kwargs}


# Of 4 pairs, the fastest turns 5.1 times in 32 tokens, and each other a tenth of that.
YARN = dict(factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.05)
LLAMA3 = dict(
  factor=4.0,
  original_max_position_embeddings=32,
  low_freq_factor=0.2,
  high_freq_factor=4.0,
)
GEMMA = dict(
  layer_types=["sliding_attention", "full_attention"],
  sliding_window=4,
  query_pre_attn_scalar=20,
  head_dim=6,
  hidden_size=16,
)
GEMMA_OURS = TIED | dict(
  norm_placement="both",
  activation="gelu_tanh",
  attention_scale=20**-0.5,
  head_dim=6,
  width=16,
  embedding_scaled=True,
  window=4,
  layer_pattern="LG",
)

FAMILIES = {
  "gpt2": Family("GPT2", GPT_SIZES, GPT | TIED | dict(positions="learned"), families.gpt2),
  "llama": Family("Llama", SIZES | rope("default"), {}),
  "llama_linear": Family(
    "Llama",
    SIZES | rope("linear", factor=4.0),
    dict(rope=RopeConfig(scaling="linear", factor=4.0)),
  ),
  "llama_yarn": Family(
    "Llama",
    SIZES | rope("yarn", **YARN),
    dict(
      rope=RopeConfig(
        scaling="yarn", factor=4.0, original_context=32, slow_turns=0.05, fast_turns=4.0
      )
    ),
  ),
  "llama_yarn_factor": Family(
    "Llama",
    SIZES
    | rope("yarn", factor=2.0, attention_factor=0.7, original_max_position_embeddings=32),
    dict(rope=RopeConfig(scaling="yarn", factor=2.0, attention_factor=0.7)),
  ),
  "llama3": Family(
    "Llama",
    SIZES | rope("llama3", **LLAMA3),
    dict(
      rope=RopeConfig(
        scaling="llama3", factor=4.0, original_context=32, slow_turns=0.2, fast_turns=4.0
      )
    ),
  ),
  "bloom": Family(
    "Bloom",
    dict(hidden_size=24, n_head=6, n_layer=2, vocab_size=32),
    GPT
    | TIED
    | dict(positions="alibi", embedding_norm=True, width=24, num_heads=6, ffn_width=96),
    families.bloom,
    tolerance=1e-7,  # its gelu has eight digits of sqrt(2 / pi)
  ),
  "gpt_neox": Family(
    "GPTNeoX",
    SIZES | rope("default", partial_rotary_factor=0.5),
    GPT | dict(parallel="two_norms", activation="gelu", rope=RopeConfig(fraction=0.5)),
    families.gpt_neox,
  ),
  "gptj": Family(
    "GPTJ",
    GPT_SIZES | dict(rotary_dim=4),
    GPT
    | dict(qkv_biased=False, o_biased=False, head_biased=True)
    | dict(parallel="one_norm", rope=RopeConfig(fraction=0.5)),
    families.gptj,
  ),
  "cohere": Family(
    "Cohere",
    SIZES | rope("default") | dict(logit_scale=0.25, layer_norm_eps=1e-5),
    TIED | dict(norm="layernorm", norm_biased=False, parallel="one_norm", logit_scale=0.25),
    functools.partial(families.llama, norms=families.COHERE_NORMS, interleaved=True),
  ),
  "gemma2": Family(
    "Gemma2",
    SIZES | GEMMA | dict(attn_logit_softcapping=0.5, final_logit_softcapping=2.0),
    GEMMA_OURS | dict(attention_softcap=0.5, logit_softcap=2.0),
    functools.partial(families.llama, norms=families.GEMMA_NORMS, plus=1.0),
  ),
  "gemma3": Family(
    "Gemma3",
    SIZES
    | GEMMA
    | dict(
      rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
      }
    ),
    GEMMA_OURS
    | dict(qk_norm="head")
    | dict(rope=RopeConfig(scaling="linear", factor=8.0, local_theta=100.0)),
    functools.partial(families.llama, norms=families.GEMMA_NORMS, plus=1.0),
  ),
  "qwen3": Family("Qwen3", SIZES | dict(head_dim=6), dict(head_dim=6, qk_norm="head")),
  "olmo2": Family(
    "Olmo2",
    SIZES,
    dict(norm_placement="output", qk_norm="width"),
    functools.partial(families.llama, norms=families.OLMO2_NORMS),
  ),
  "mixtral": Family(
    "Mixtral",
    SIZES | dict(num_local_experts=5, num_experts_per_tok=2),
    dict(moe=MoEConfig(num_experts=5, experts_per_token=2), rope=RopeConfig(theta=1e6)),
  ),
  "qwen2_moe": Family(
    "Qwen2Moe",
    SIZES
    | dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=6)
    | dict(shared_expert_intermediate_size=12),
    dict(
      qkv_biased=True,
      moe=MoEConfig(
        num_experts=5,
        experts_per_token=3,
        expert_width=6,
        num_shared_experts=2,
        shared_gated=True,
        normalized=False,
      ),
    ),
  ),
}


@contextlib.contextmanager
def in_float64(torch):
  """Replaces float32, which their code uses for norms, rotations and softmax."""

  class InFloat64(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
      wide = lambda x: torch.float64 if x is torch.float32 else x
      if func is torch.Tensor.float:
        func = torch.Tensor.double
      kwargs = {name: wide(value) for name, value in (kwargs or {}).items()}
      return func(*map(wide, args), **kwargs)

  torch.set_default_dtype(torch.float64)
  try:
    with InFloat64():
      yield
  finally:
    torch.set_default_dtype(torch.float32)


def randomized(torch, model) -> tuple[Any, families.State]:
  """The model with every parameter random, in float64; and its weights.

  Norms and biases too: ones and zeros would hide mistakes.
  """
  model = model.double().eval()
  random = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.empty_like(parameter).normal_(generator=random)
      old = parameter if parameter.ndim < 2 else 0
      parameter.copy_(old + (0.1 if parameter.ndim < 2 else 0.3) * noise)
  return model, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def tokens(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 32, shape)


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_decoder_equals_transformers(name):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  family = FAMILIES[name]
  configs = {"Gemma3": "Gemma3TextConfig"}
  models = {"GPT2": "GPT2LMHeadModel"}
  config = getattr(transformers, configs.get(family.name, f"{family.name}Config"))
  build = getattr(transformers, models.get(family.name, f"{family.name}ForCausalLM"))
  tokens_BT = tokens(2, 13)
  eager = dict(attn_implementation="eager", experts_implementation="eager")
  with torch.no_grad(), in_float64(torch):
    model, state = randomized(torch, build(config(**family.theirs, **eager)))
    theirs = model(torch.tensor(tokens_BT)).logits.numpy()
  cfg = ModelConfig(**OURS | family.ours)
  ours = references.decoder(family.params(state, cfg), cfg, tokens_BT)
  assert np.std(theirs) > 0.1
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=family.tolerance)


@pytest.mark.parity
def test_encoder_equals_bert():
  """Padding, token types, the masked-language-model head and the pooler."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  sizes = SIZES | dict(pad_token_id=0)
  del sizes["num_key_value_heads"]
  config = transformers.BertConfig(**sizes, attn_implementation="eager")
  tokens_BT = tokens(2, 9)
  types_BT = np.array([[0] * 4 + [1] * 5] * 2)
  segments_BT = np.array([[1] * 9, [1] * 6 + [0] * 3])
  with torch.no_grad(), in_float64(torch):
    model, state = randomized(torch, transformers.BertForPreTraining(config))
    theirs = model(
      torch.tensor(tokens_BT),
      attention_mask=torch.tensor(segments_BT),
      token_type_ids=torch.tensor(types_BT),
      output_hidden_states=True,
    )
    theirs_BTD = theirs.hidden_states[-1]
    theirs_pooled_BD = model.bert.pooler(theirs_BTD)
  cfg = ModelConfig(
    **OURS
    | GPT
    | TIED
    | dict(family="encoder", positions="learned", norm_placement="post", activation="gelu")
    | dict(embedding_norm=True, num_token_types=2, pooler=True, norm_epsilon=1e-12)
    | dict(head_transform=True, head_biased=True)
  )
  params = families.bert(state, cfg)
  arguments = dict(segments_BT=segments_BT, types_BT=types_BT)
  hidden_BTD = references.encoder_hidden(params, cfg, tokens_BT, **arguments)
  logits_BTV = references.encoder(params, cfg, tokens_BT, **arguments)
  real = segments_BT > 0
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9)
  close(hidden_BTD[real], theirs_BTD.numpy()[real])
  close(logits_BTV[real], theirs.prediction_logits.numpy()[real])
  close(references.pooled(params, hidden_BTD), theirs_pooled_BD.numpy())


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["t5", "flan_t5"])
def test_encoder_decoder_equals_t5(kind):
  """T5 (relu, tied, logits times D^-0.5), and FLAN-T5 (gated gelu, a head of its own)."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  original = kind == "t5"
  config = transformers.T5Config(
    d_model=32,
    d_kv=6,
    d_ff=24,
    num_heads=4,
    num_layers=2,
    num_decoder_layers=1,
    vocab_size=32,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    feed_forward_proj="relu" if original else "gated-gelu",
    tie_word_embeddings=original,
    attn_implementation="eager",
  )
  source_BS, tokens_BT = tokens(2, 14), tokens(2, 12)
  segments_BS = np.array([[1] * 14, [1] * 9 + [0] * 5])
  with torch.no_grad(), in_float64(torch):
    model = transformers.T5ForConditionalGeneration(config)
    if not original:  # it ties them all the same, until a checkpoint has both
      model.lm_head.weight = torch.nn.Parameter(torch.empty(32, 32))
    model, state = randomized(torch, model)
    theirs = model(
      input_ids=torch.tensor(source_BS),
      attention_mask=torch.tensor(segments_BS),
      decoder_input_ids=torch.tensor(tokens_BT),
    ).logits.numpy()
  cfg = ModelConfig(
    **OURS
    | MHA
    | dict(family="encoder_decoder", positions="relative", depth=1, encoder_depth=2)
    | dict(head_dim=6, relative_buckets=8, relative_distance=10, norm_epsilon=1e-6)
    | dict(gated=not original, activation="relu" if original else "gelu_tanh")
    | dict(attention_scale=1.0, tied_embeddings=original)
    | dict(logit_scale=32**-0.5 if original else 1.0)
  )
  ours = references.encoder_decoder(
    families.t5(state, cfg), cfg, source_BS, tokens_BT, source_segments_BS=segments_BS
  )
  assert np.std(theirs) > 0.1
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parity
def test_encoder_decoder_equals_torch_layers_over_packed_pairs():
  """The layers of Vaswani et al. (2017), as torch.nn has them; masks keep pairs apart."""
  torch = pytest.importorskip("torch")
  sizes = dict(d_model=16, nhead=4, dim_feedforward=24, dropout=0.0, batch_first=True)
  encode, encoder = randomized(torch, torch.nn.TransformerEncoderLayer(**sizes))
  decode, decoder = randomized(torch, torch.nn.TransformerDecoderLayer(**sizes))
  table = np.random.default_rng(1).normal(size=(32, 16))
  source_BS, tokens_BT = tokens(1, 7), tokens(1, 6)
  source_segments_S = np.array([1, 1, 1, 2, 2, 2, 2])
  segments_T = np.array([1, 1, 2, 2, 2, 2])
  apart = lambda queries, keys: torch.tensor(queries[:, None] != keys)
  with torch.no_grad():
    memory = encode(
      torch.tensor(table[source_BS]), apart(source_segments_S, source_segments_S)
    )
    theirs_BTD = decode(
      torch.tensor(table[tokens_BT]),
      memory,
      apart(segments_T, segments_T) | torch.ones(6, 6).triu(1).bool(),
      apart(segments_T, source_segments_S),
    )
  cfg = ModelConfig(
    **OURS
    | GPT
    | TIED
    | dict(family="encoder_decoder", positions="none", depth=1, width=16)
    | dict(norm_placement="post", activation="relu")
  )
  stacks = {"encoder": encoder, "decoder": decoder}
  params = {
    name: {"blocks": families.stacked([families.torch_layer(state, cfg)])}
    for name, state in stacks.items()
  }
  ours = references.encoder_decoder(
    params | {"embedding": {"table": table}},
    cfg,
    source_BS,
    tokens_BT,
    source_segments_BS=source_segments_S[None],
    segments_BT=segments_T[None],
  )
  np.testing.assert_allclose(ours, theirs_BTD.numpy() @ table.T, rtol=0, atol=1e-9)


@pytest.mark.parity
def test_learned_sinks_equal_gpt_oss():
  """Its attention alone (its experts are of another kind), without positions."""
  torch = pytest.importorskip("torch")
  gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
  config = gpt_oss.GptOssConfig(**SIZES, head_dim=6, attn_implementation="eager")
  layer = gpt_oss.GptOssAttention(config, 0)
  with torch.no_grad():
    layer.sinks.zero_()  # it leaves them empty
  layer, state = randomized(torch, layer)
  x_TD = np.random.default_rng(1).normal(size=(9, 32))
  distance = np.arange(9)[:, None] - np.arange(9)
  mask = np.where((distance >= 0) & (distance < 3), 0.0, -np.inf)
  still = (torch.ones(1, 9, 3).double(), torch.zeros(1, 9, 3).double())  # cos, sin
  with torch.no_grad():
    theirs, _ = layer(torch.tensor(x_TD)[None], still, torch.tensor(mask)[None, None])
  cfg = ModelConfig(
    **OURS | dict(head_dim=6, biased=True, positions="none", window=3, learned_sinks=True)
  )
  params = families.gpt_oss_attention(state, cfg)
  row = references.Row(None, np.ones(9), np.arange(9), None)
  ours = references.self_attention(params, {}, cfg, x_TD, row, causal=True, local=True)
  np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=0, atol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 10)])
def test_buckets_equal_t5(causal, buckets, furthest):
  """Its float32 arithmetic has the same bucket limits as our whole numbers."""
  torch = pytest.importorskip("torch")
  modeling_t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
  distances = np.arange(-300, 301)
  theirs = modeling_t5.T5Attention._relative_position_bucket(
    torch.tensor(distances), not causal, buckets, furthest
  )
  bucket = reference_positions.relative_bucket
  ours = [bucket(int(distance), buckets, furthest, causal) for distance in distances]
  assert ours == theirs.tolist()


# -- What the papers promise -----------------------------------------------------------


def test_alibi_slopes():
  """Press et al. (2022), section 3: 1/2, ..., 1/2^8; beyond 8 heads every other of 16."""
  assert reference_positions.alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
  slopes = reference_positions.alibi_slopes(12)
  assert slopes[:8] == reference_positions.alibi_slopes(8)
  np.testing.assert_allclose(slopes[8:], [2 ** -(n + 0.5) for n in range(4)])


def test_relative_buckets():
  """Raffel et al. (2020), section 2.1: 32, ranges growing up to a distance of 128."""
  causal = lambda d: reference_positions.relative_bucket(d, 32, 128, True)
  assert [causal(-d) for d in range(17)] == [*range(17)]
  assert [causal(-d) for d in (18, 19, 26, 112, 113, 128, 9999)] == [
    *(16, 17, 19, 30, 31, 31, 31)
  ]
  assert causal(1) == causal(5) == 0
  either = lambda d: reference_positions.relative_bucket(d, 32, 128, False)
  assert [either(d) for d in (-128, -8, -7, -1, 0, 1, 7, 8, 128)] == [
    *(15, 8, 7, 1, 0, 17, 23, 24, 31)
  ]


def test_rotation_keeps_lengths_and_distances():
  """Scores depend on the distance alone (Su et al., 2021, section 3.2.2)."""
  q_H, k_H = np.random.default_rng(0).normal(size=(2, 12))
  cfg = ModelConfig(head_dim=12, rope=RopeConfig(fraction=0.7))
  angles, factor = reference_positions.rotation(cfg, 12, local=False)
  assert len(angles) == 4
  assert factor == 1
  at = lambda x_H, position: reference_positions.rotate(x_H, position, angles)
  np.testing.assert_allclose(at(q_H, 3) @ at(k_H, 1), at(q_H, 90) @ at(k_H, 88))
  np.testing.assert_allclose(np.linalg.norm(at(q_H, 7)), np.linalg.norm(q_H))
  np.testing.assert_array_equal(at(q_H, 7)[8:], q_H[8:])


@pytest.mark.parametrize("scaling", ["linear", "ntk", "yarn", "llama3"])
def test_stretching_slows_the_slowest_pair_by_the_factor(scaling):
  """The fastest pair stays unless scaling is linear; a local theta is never stretched."""
  rope = RopeConfig(scaling=scaling, factor=4.0, fast_turns=10.0, local_theta=300.0)
  cfg = ModelConfig(context=4096, rope=rope)
  plain = reference_positions.plain_angles(rope.theta, 64)
  angles, factor = reference_positions.rotation(cfg, 64, local=False)
  np.testing.assert_allclose(angles[-1], plain[-1] / 4)
  assert (angles[0] == plain[0]) == (scaling != "linear")
  assert all(new <= old for new, old in zip(angles, plain, strict=True))
  assert (factor > 1) == (scaling == "yarn")
  local, factor = reference_positions.rotation(cfg, 64, local=True)
  assert (local, factor) == (reference_positions.plain_angles(300.0, 64), 1)


@pytest.mark.parametrize(
  ("causal", "expected"),
  [
    (True, ["1....", "11...", "111..", "1.11.", "....1"]),
    (False, ["11...", "111..", "1111.", "1.11.", "....1"]),
  ],
)
def test_what_a_local_layer_sees(causal, expected):
  """A window of two and one sink, in a row of two documents: queries down, keys across."""
  cfg = ModelConfig(window=2, sink_tokens=1)
  segments_T, positions_T = [1, 1, 1, 1, 2], [0, 1, 2, 3, 0]
  seen = lambda t, s: visible(cfg, t, s, segments_T, positions_T, causal=causal, local=True)
  rows = ["".join(".1"[seen(t, s)] for s in range(5)) for t in range(5)]
  assert rows == expected


def test_a_mixture_of_equal_experts_is_that_expert():
  """Whatever the router says, if weights add up to 1 (Jiang et al., 2024, section 2.1)."""
  random = np.random.default_rng(0).normal
  ffn = {name: {"kernel": random(size=(5, 5))} for name in ("gate", "up", "down")}
  same = {name: {"kernel": np.stack([x["kernel"]] * 4)} for name, x in ffn.items()}
  cfg = ModelConfig(moe=MoEConfig(num_experts=4, experts_per_token=2))
  x_TD = random(size=(3, 5))
  mixed = references.mixture(
    {"router": {"kernel": random(size=(5, 4))}, "experts": same}, cfg, x_TD
  )
  np.testing.assert_allclose(mixed, references.ffn(ffn, cfg, x_TD, biased=False))
