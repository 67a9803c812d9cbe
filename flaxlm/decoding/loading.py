# SPDX-License-Identifier: Apache-2.0
"""A trained run as a model: its parameters and tokenizer loaded, prepared for decoding."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxlm.checkpoint.manifest import damage
from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import FUSED, ResolvedConfig
from flaxlm.decoding.sampling import is_number
from flaxlm.decoding.speculative import DRAFT_TOKENS, Draft
from flaxlm.decoding.weights import KINDS, WEIGHTS_KERNELS, check_stored, prepare_params
from flaxlm.errors import CheckpointError, ConfigError
from flaxlm.nn.base import LanguageModel
from flaxlm.nn.lora import abstract_adapters, abstract_frozen, freeze, merged
from flaxlm.nn.models import abstract_params, boxed_shapes, build_model
from flaxlm.origin import COMPARES, Origin, checkpoint_of, located
from flaxlm.platform import fused_kernel
from flaxlm.runs import (
  CHECKPOINTS,
  CONFIG,
  IMPORTED_FILES,
  TOKENIZER,
  check_unchanged,
  find_run,
  load_config_of,
  newest_whole_step,
)
from flaxlm.sharding import mesh_for, use_mesh
from flaxlm.tokenizers import AnyTokenizer, load_tokenizer
from flaxlm.tokenizers.imported import SPECIALS


class Run(NamedTuple):
  """A trained model as stored at one step, and what it needs to read and write text."""

  path: Path
  cfg: ResolvedConfig
  tokenizer: AnyTokenizer
  step: int
  model: LanguageModel
  params: Any
  mesh: Mesh
  draft: Draft | None = None  # guesses tokens for this run

  @property
  def num_ids(self) -> int:
    """How many ids can be written: those that both tokenizer and model have."""
    return min(self.tokenizer.vocab_size, self.model.cfg.num_ids)

  @property
  def is_headless(self) -> bool:
    """Whether it is an imported encoder that came without a head to fill masks with."""
    cfg = self.cfg.model
    imported = (self.path / IMPORTED_FILES / CONFIG).is_file()
    return imported and cfg.family == "encoder" and not cfg.head_transform


def load_run(
  path: Path,
  mesh: Mesh,
  warn: Callable[[str], None] | None = None,
  needs_text: bool = True,
  has_own_mesh: bool = True,
) -> Run:
  """The newest whole checkpoint of a run, its parameters sharded over the devices of
  `mesh`: over `mesh_for` them, or over `mesh` itself if that is another run's.

  `warn` gets a line for each damaged checkpoint that is skipped. Without `needs_text`
  the run may lack a tokenizer, as an imported one may; `Run.tokenizer` is then None.
  Raises `CheckpointError` when there is no checkpoint, it does not fit its config, or
  config or tokenizer are not as they were written.
  """
  cfg = load_config_of(path)
  if has_own_mesh:
    mesh = mesh_for(mesh, cfg.model)
  step = newest_whole_step(path / CHECKPOINTS, warn)
  if step is None:
    raise CheckpointError(f"{path} has no checkpoint yet", "train it first")
  check_unchanged(path, TOKENIZER, SPECIALS)
  tokenizer: Any = None
  if needs_text or (path / TOKENIZER).exists():
    tokenizer = load_tokenizer(path / TOKENIZER)
  training = dataclasses.replace(cfg.training, matmul="full")  # that is for training alone
  if training.attention in FUSED:  # these need not be the devices that it was trained on
    training = dataclasses.replace(training, attention="auto")
  model = build_model(cfg.model, training, fused_kernel())
  try:
    of = checkpoint_of(path, step)
    params = load_params(of, abstract_params(model, mesh), mesh)
  except Exception:  # Orbax raises all kinds for files that vanish while they are read
    if not damage(path / CHECKPOINTS / str(step)):
      raise
    # Training goes on meanwhile, and has deleted the step: there is a newer one.
    return load_run(path, mesh, warn, needs_text, has_own_mesh)
  return Run(path, cfg, tokenizer, step, model, params, mesh)


def restore_params(path: Path, step: int, target: Any) -> Any:
  """The stored parameters of a run, each typed and sharded like its target."""
  store = CheckpointStore(path / CHECKPOINTS)
  try:
    return store.restore(step, params=target)["params"]
  finally:
    store.close()


def load_params(of: Origin, target: Any, mesh: Mesh) -> Any:
  """The parameters of a checkpoint, each typed and sharded like its target.

  Adapters are merged into those of the run that they began from. The target's vocabulary
  may have more rows of padding, as its mesh needs: they are zeros.
  """
  cfg = load_config_of(of.path)
  if cfg.lora.rank:
    model = build_model(cfg.model, cfg.training)
    base = load_params(located(of.path), target, mesh)
    frozen = freeze(base, abstract_frozen(model, cfg.lora, mesh), cfg.lora)
    wanted = abstract_adapters(model, cfg.lora, mesh)
    return merged(frozen, restore_params(of.path, of.step, wanted), target)
  if target["embedding"]["table"].shape[0] == cfg.model.vocab_size:
    return restore_params(of.path, of.step, target)
  stored = nn.unbox(boxed_shapes(build_model(cfg.model)))
  place = functools.partial(without_growth, mesh)
  params = restore_params(of.path, of.step, jax.tree.map(place, target, stored))
  return jax.tree.map(grown, params, target)


def load_reference(run: Run) -> Any:
  """The parameters that a run of preferences began from; those of adapters as they were
  kept while they learnt. Raises `CheckpointError` if the other run is gone."""
  abstract = abstract_params(run.model, run.mesh)
  params = load_params(located(run.path, COMPARES), abstract, run.mesh)
  lora = run.cfg.lora
  if not lora.rank:
    return params
  return freeze(params, abstract_frozen(run.model, lora, run.mesh), lora)


def without_growth(mesh: Mesh, wanted: Any, has: Any) -> jax.ShapeDtypeStruct:
  """A target for an array that is stored smaller: the dims that will grow are not cut."""
  if wanted.shape == has.shape:
    return wanted
  spec = [*wanted.sharding.spec, *[None] * len(has.shape)][: len(has.shape)]
  sizes = zip(spec, wanted.shape, has.shape, strict=True)
  kept = [axes if n == m else None for axes, n, m in sizes]
  sharding = NamedSharding(mesh, PartitionSpec(*kept))
  return jax.ShapeDtypeStruct(has.shape, wanted.dtype, sharding=sharding)


def grown(array: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
  """The array with zeros at the end of its dims, as large as is wanted."""
  missing = [(0, n - m) for n, m in zip(wanted.shape, array.shape, strict=True)]
  if array.shape == wanted.shape:
    return array
  return jax.jit(lambda x: jnp.pad(x, missing), out_shardings=wanted.sharding)(array)


def prepare_for_decoding(
  run: Run,
  weights: str | None = None,
  narrow_cache: bool = False,
  weights_kernel: str | None = None,
) -> Run:
  """The run with its parameters laid out as decoding reads them fastest.

  It pays when the run decodes more than once. `weights` is the dtype that matrices are
  kept in: with bfloat16 the model also computes in it, with int8 and int4 it does not.
  `narrow_cache` keeps keys and values as int8. `weights_kernel` is that of narrow weights.
  Raises `ConfigError` for an RNN, which supports neither, and for what a model's sizes or
  the devices do not allow.
  """
  model = run.model
  check_stored(run.cfg.model.family, weights, narrow_cache)
  if weights_kernel is not None:
    check_kernel(run, weights)
  execution = dataclasses.replace(
    model.execution, narrow_cache=narrow_cache, weights_kernel=weights_kernel
  )
  if weights == "bfloat16":
    execution = dataclasses.replace(execution, dtype=jnp.dtype("bfloat16"))
  with use_mesh(run.mesh):
    params = prepare_params(run.params, model.cfg, weights)
  return run._replace(params=params, model=model.clone(execution=execution))


def check_kernel(run: Run, weights: str | None) -> None:
  """Raises `ConfigError` if the kernel for narrow weights cannot run a model here."""
  from flaxlm.nn.kernels.few_rows import obstacle  # it takes time to import

  cure = "leave weights_kernel out: XLA's products do it"
  if weights not in ("int8", "int4"):
    raise ConfigError("weights_kernel is for narrow weights", "add weights int8 or int4")
  if fused_kernel().name != "cudnn":
    raise ConfigError("weights_kernel=pallas is for NVIDIA GPUs from Ampere on", cure)
  if run.mesh.size > 1:
    raise ConfigError("weights_kernel=pallas is for one device", cure)
  lay_out = functools.partial(prepare_params, cfg=run.cfg.model, kind=weights)
  for path, leaf in flatten_dict(jax.eval_shape(lay_out, run.params)).items():
    if path[-1] == "matrix" and "blocks" in path:
      num_outputs, width = leaf.shape
      why = obstacle(num_outputs, width * (2 if weights == "int4" else 1))
      if why is not None:
        raise ConfigError(f"weights_kernel=pallas is not possible: {why}", cure)


def equip_for_decoding(
  run: Run,
  weights: str | None = None,
  cache: str | None = None,
  draft: str | None = None,
  draft_tokens: int | None = None,
  runs_dir: str = "runs",
  weights_kernel: str | None = None,
) -> Run:
  """The run as a user asks for it: prepared, with a draft that guesses `draft_tokens` at a
  time, a smaller run or `ngram`.

  An encoder, which writes nothing, stays as it is. Raises `ConfigError` for what the run
  cannot have.
  """
  asked = {
    "weights": (weights, KINDS),
    "cache": (cache, ("int8",)),
    "weights_kernel": (weights_kernel, WEIGHTS_KERNELS),
  }
  for name, (value, choices) in asked.items():
    if value is not None and value not in choices:
      raise ConfigError(f"{name} is {value!r}", f"it can be {', '.join(choices)}")
  if draft_tokens is not None and draft is None:
    raise ConfigError("draft_tokens without a draft", "name one, or ngram")
  if run.cfg.model.family == "encoder":
    if weights or cache or draft or weights_kernel:
      raise ConfigError(
        f"{run.path} is an encoder: it has no narrow weights or cache, and no draft",
        "leave them out",
      )
    return run
  run = prepare_for_decoding(run, weights, cache == "int8", weights_kernel)
  if draft is None:
    return run
  num_tokens = DRAFT_TOKENS if draft_tokens is None else draft_tokens
  if not is_number(num_tokens, whole=True) or num_tokens < 1:
    raise ConfigError(f"draft_tokens is {num_tokens!r}", "use at least 1")
  if draft == "ngram":
    return run._replace(draft=Draft(num_tokens=num_tokens))
  guesser = load_run(find_run(draft, runs_dir), run.mesh, has_own_mesh=False)
  small = prepare_for_decoding(guesser)
  if small.tokenizer.fingerprint != run.tokenizer.fingerprint:
    raise ConfigError(
      f"{draft} has another tokenizer", "use a draft with the run's tokenizer"
    )
  return run._replace(draft=Draft(small.model, small.params, num_tokens))
