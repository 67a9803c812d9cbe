# SPDX-License-Identifier: Apache-2.0
"""Maps the weights of other packages' models to our parameter tree, family by family.

For `test_references`, and minimal: no checks, no reverse direction. `state` is the
package's state_dict, as arrays; `cfg` is our config of the same model.
"""

import functools
from typing import Any

import numpy as np

from flaxlm.config import ModelConfig

State = dict[str, np.ndarray]


def linear(state: State, name: str) -> dict:
  """torch.nn.Linear keeps (out, in); a kernel is (in, out)."""
  layer = {"kernel": state[f"{name}.weight"].T}
  return layer | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


def norm(state: State, name: str, plus: float = 0.0) -> dict:
  """A norm's scale and bias; `plus` 1 where the scale is 1 + weight (Gemma)."""
  layer = {"scale": state[f"{name}.weight"] + plus}
  return layer | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


def heads(layer: dict, N: int) -> dict:
  """(D, N * H) -> (D, N, H) and (N * H) -> (N, H): a query, key or value projection."""
  return {name: x.reshape(*x.shape[:-1], N, -1) for name, x in layer.items()}


def merged(layer: dict, N: int) -> dict:
  """(N * H, D) -> (N, H, D): attention's output projection; its bias stays."""
  return layer | {"kernel": layer["kernel"].reshape(N, -1, layer["kernel"].shape[-1])}


def halves(layer: dict, R: int) -> dict:
  """Pairs (2i, 2i + 1) of each head's first R dims become (i, i + R/2): RoPE's layout."""
  order = [*range(0, R, 2), *range(1, R, 2)]
  return {
    name: np.concatenate([x[..., order], x[..., R:]], -1) for name, x in layer.items()
  }


def split_qkv(fused: dict, N: int, outer: str) -> dict:
  """q, k and v of one matrix: (D, 3, N, H), or (D, N, 3, H) if heads are outermost."""
  shape, dim = ((3, N, -1), -3) if outer == "qkv" else ((N, 3, -1), -2)
  parts = {name: x.reshape(*x.shape[:-1], *shape) for name, x in fused.items()}
  return {
    letter: {name: np.take(x, i, dim) for name, x in parts.items()}
    for i, letter in enumerate("qkv")
  }


def stacked(layers: list) -> Any:
  """One tree whose arrays lead with L."""
  if isinstance(layers[0], dict):
    return {name: stacked([layer[name] for layer in layers]) for name in layers[0]}
  return np.stack(layers)


def gpt2(state: State, cfg: ModelConfig) -> dict:
  def conv(name):  # its Conv1D keeps (in, out), as we do
    return {"kernel": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

  def block(at):
    attention = split_qkv(conv(f"{at}.attn.c_attn"), cfg.num_heads, outer="qkv")
    return {
      "attention_norm": norm(state, f"{at}.ln_1"),
      "ffn_norm": norm(state, f"{at}.ln_2"),
      "attention": attention | {"o": merged(conv(f"{at}.attn.c_proj"), cfg.num_heads)},
      "ffn": {"up": conv(f"{at}.mlp.c_fc"), "down": conv(f"{at}.mlp.c_proj")},
    }

  return {
    "embedding": {"table": state["transformer.wte.weight"]},
    "positions": {"table": state["transformer.wpe.weight"]},
    "blocks": stacked([block(f"transformer.h.{l}") for l in range(cfg.depth)]),
    "final_norm": norm(state, "transformer.ln_f"),
  }


def fused_blocks(state: State, cfg: ModelConfig, layers: str, attention: str) -> dict:
  """Blocks whose q, k and v are one matrix, head by head."""

  def block(at):
    fused = linear(state, f"{at}.{attention}.query_key_value")
    output = linear(state, f"{at}.{attention}.dense")
    return {
      "attention_norm": norm(state, f"{at}.input_layernorm"),
      "ffn_norm": norm(state, f"{at}.post_attention_layernorm"),
      "attention": split_qkv(fused, cfg.num_heads, outer="heads")
      | {"o": merged(output, cfg.num_heads)},
      "ffn": {
        "up": linear(state, f"{at}.mlp.dense_h_to_4h"),
        "down": linear(state, f"{at}.mlp.dense_4h_to_h"),
      },
    }

  return stacked([block(f"{layers}.{l}") for l in range(cfg.depth)])


def bloom(state: State, cfg: ModelConfig) -> dict:
  return {
    "embedding": {"table": state["transformer.word_embeddings.weight"]},
    "embedding_norm": norm(state, "transformer.word_embeddings_layernorm"),
    "blocks": fused_blocks(state, cfg, "transformer.h", "self_attention"),
    "final_norm": norm(state, "transformer.ln_f"),
  }


def gpt_neox(state: State, cfg: ModelConfig) -> dict:
  return {
    "embedding": {"table": state["gpt_neox.embed_in.weight"]},
    "blocks": fused_blocks(state, cfg, "gpt_neox.layers", "attention"),
    "final_norm": norm(state, "gpt_neox.final_layer_norm"),
    "head": linear(state, "lm_head"),
  }


def gptj(state: State, cfg: ModelConfig) -> dict:
  R = int(cfg.rope.fraction * cfg.width / cfg.num_heads)

  def block(at):
    projections = {x: linear(state, f"{at}.attn.{x}_proj") for x in "qkv"}
    q, k, v = (heads(layer, cfg.num_heads) for layer in projections.values())
    output = linear(state, f"{at}.attn.out_proj")
    return {
      "attention_norm": norm(state, f"{at}.ln_1"),
      "attention": {
        "q": halves(q, R),
        "k": halves(k, R),
        "v": v,
        "o": merged(output, cfg.num_heads),
      },
      "ffn": {
        "up": linear(state, f"{at}.mlp.fc_in"),
        "down": linear(state, f"{at}.mlp.fc_out"),
      },
    }

  return {
    "embedding": {"table": state["transformer.wte.weight"]},
    "blocks": stacked([block(f"transformer.h.{l}") for l in range(cfg.depth)]),
    "final_norm": norm(state, "transformer.ln_f"),
    "head": {"kernel": state["lm_head.weight"].T},
    "head_bias": state["lm_head.bias"],
  }


# LLaMA's children share its names, and differ in where the norms are and what they add.
LLAMA_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
OLMO2_NORMS = {
  "attention_output_norm": "post_attention_layernorm",
  "ffn_output_norm": "post_feedforward_layernorm",
}
GEMMA_NORMS = OLMO2_NORMS | {
  "attention_norm": "input_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
}
COHERE_NORMS = {"attention_norm": "input_layernorm"}


def llama(
  state: State,
  cfg: ModelConfig,
  norms: dict[str, str] = LLAMA_NORMS,
  plus: float = 0.0,
  interleaved: bool = False,
) -> dict:
  cfg = cfg.resolve()
  N, K = cfg.num_heads, cfg.num_kv_heads
  turned = functools.partial(halves, R=cfg.head_dim if interleaved else 0)

  def attention(at):
    q, k, v = (linear(state, f"{at}.{x}_proj") for x in "qkv")
    layer = {"q": turned(heads(q, N)), "k": turned(heads(k, K)), "v": heads(v, K)}
    layer["o"] = merged(linear(state, f"{at}.o_proj"), N)
    if cfg.qk_norm != "none":
      layer |= {f"{x}_norm": norm(state, f"{at}.{x}_norm", plus) for x in "qk"}
    if cfg.qk_norm == "width":
      layer["q_norm"], layer["k_norm"] = (
        heads(layer["q_norm"], N),
        heads(layer["k_norm"], K),
      )
    return layer

  def ffn(at):
    if cfg.moe.num_experts:
      return experts(state, at, cfg)
    return {x: linear(state, f"{at}.{x}_proj") for x in ("gate", "up", "down")}

  def block(at):
    layer = {ours: norm(state, f"{at}.{theirs}", plus) for ours, theirs in norms.items()}
    return layer | {"attention": attention(f"{at}.self_attn"), "ffn": ffn(f"{at}.mlp")}

  tree = {
    "embedding": {"table": state["model.embed_tokens.weight"]},
    "blocks": stacked([block(f"model.layers.{l}") for l in range(cfg.depth)]),
    "final_norm": norm(state, "model.norm", plus),
  }
  return tree if cfg.tied_embeddings else tree | {"head": linear(state, "lm_head")}


def experts(state: State, at: str, cfg: ModelConfig) -> dict:
  """Mixtral and Qwen2-MoE: gate above up in one (E, 2 F, D), each matrix (out, in)."""
  gate, up = np.split(state[f"{at}.experts.gate_up_proj"].swapaxes(1, 2), 2, -1)
  layer = {
    "router": linear(state, f"{at}.gate"),
    "experts": {
      "gate": {"kernel": gate},
      "up": {"kernel": up},
      "down": {"kernel": state[f"{at}.experts.down_proj"].swapaxes(1, 2)},
    },
  }
  if cfg.moe.num_shared_experts:
    shared = f"{at}.shared_expert"
    names = ("gate", "up", "down")
    layer["shared"] = {x: linear(state, f"{shared}.{x}_proj") for x in names}
    layer["shared_gate"] = linear(state, f"{shared}_gate")
  return layer


def bert(state: State, cfg: ModelConfig) -> dict:
  N = cfg.num_heads

  def block(at):
    projections = {"q": "query", "k": "key", "v": "value"}
    attention = {
      x: heads(linear(state, f"{at}.attention.self.{name}"), N)
      for x, name in projections.items()
    }
    attention["o"] = merged(linear(state, f"{at}.attention.output.dense"), N)
    return {
      "attention": attention,
      "attention_norm": norm(state, f"{at}.attention.output.LayerNorm"),
      "ffn": {
        "up": linear(state, f"{at}.intermediate.dense"),
        "down": linear(state, f"{at}.output.dense"),
      },
      "ffn_norm": norm(state, f"{at}.output.LayerNorm"),
    }

  tables = {"embedding": "word", "positions": "position", "token_types": "token_type"}
  head = "cls.predictions"
  return {
    ours: {"table": state[f"bert.embeddings.{theirs}_embeddings.weight"]}
    for ours, theirs in tables.items()
  } | {
    "embedding_norm": norm(state, "bert.embeddings.LayerNorm"),
    "blocks": stacked([block(f"bert.encoder.layer.{l}") for l in range(cfg.depth)]),
    "head_transform": {
      "dense": linear(state, f"{head}.transform.dense"),
      "norm": norm(state, f"{head}.transform.LayerNorm"),
    },
    "head_bias": state[f"{head}.bias"],
    "pooler": linear(state, "bert.pooler.dense"),
  }


def t5(state: State, cfg: ModelConfig) -> dict:
  N = cfg.num_heads
  gated = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
  names = gated if cfg.gated else {"up": "wi", "down": "wo"}

  def attention(at):
    q, k, v = (heads(linear(state, f"{at}.{x}"), N) for x in "qkv")
    return {"q": q, "k": k, "v": v, "o": merged(linear(state, f"{at}.o"), N)}

  def block(at, crossed):
    layer = {
      "attention": attention(f"{at}.0.SelfAttention"),
      "attention_norm": norm(state, f"{at}.0.layer_norm"),
    }
    if crossed:
      layer["cross_attention"] = attention(f"{at}.1.EncDecAttention")
      layer["cross_attention_norm"] = norm(state, f"{at}.1.layer_norm")
    last = f"{at}.{2 if crossed else 1}"
    layer["ffn"] = {
      ours: linear(state, f"{last}.DenseReluDense.{theirs}")
      for ours, theirs in names.items()
    }
    return layer | {"ffn_norm": norm(state, f"{last}.layer_norm")}

  def stack(name, depth):
    first = f"{name}.block.0.layer.0.SelfAttention"
    return {
      "relative_bias": {"table": state[f"{first}.relative_attention_bias.weight"]},
      "blocks": stacked(
        [block(f"{name}.block.{l}.layer", name == "decoder") for l in range(depth)]
      ),
      "final_norm": norm(state, f"{name}.final_layer_norm"),
    }

  tree = {
    "embedding": {"table": state["shared.weight"]},
    "encoder": stack("encoder", cfg.encoder_depth),
    "decoder": stack("decoder", cfg.depth),
  }
  return tree if cfg.tied_embeddings else tree | {"head": linear(state, "lm_head")}


def gpt_oss_attention(state: State, cfg: ModelConfig) -> dict:
  q, k, v, o = (linear(state, f"{x}_proj") for x in "qkvo")
  N, K = cfg.num_heads, cfg.num_kv_heads
  layer = {"q": heads(q, N), "k": heads(k, K), "v": heads(v, K), "o": merged(o, N)}
  return layer | {"sinks": state["sinks"]}


def torch_layer(state: State, cfg: ModelConfig) -> dict:
  """torch.nn's encoder or decoder layer, which numbers its norms in order."""
  N, names = cfg.num_heads, {"kernel": "weight", "bias": "bias"}

  def attention(at):
    fused = {x: state[f"{at}.in_proj_{theirs}"].T for x, theirs in names.items()}
    output = merged(linear(state, f"{at}.out_proj"), N)
    return split_qkv(fused, N, outer="qkv") | {"o": output}

  block = {
    "attention": attention("self_attn"),
    "attention_norm": norm(state, "norm1"),
    "ffn": {"up": linear(state, "linear1"), "down": linear(state, "linear2")},
    "ffn_norm": norm(state, "norm2"),
  }
  if "norm3.weight" in state:
    block["cross_attention"] = attention("multihead_attn")
    block["cross_attention_norm"] = norm(state, "norm2")
    block["ffn_norm"] = norm(state, "norm3")
  return block
