# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The tables of weights say which of their modules a projection of ours is. Where theirs is
fused (q, k and v in one), one adapter of three times the rank stands for three of ours; in
the other direction the three share A, and each has its part of B.
"""

import dataclasses
import hashlib
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import Config, LoraConfig, ResolvedConfig, ResolvedModel, to_json
from flaxlm.decoding.loading import Run, load_params, restore_params
from flaxlm.errors import CheckpointError, ConfigError, FlaxLMError
from flaxlm.interop.card import ADAPTER_DOCUMENTS, Exported, keep_documents, write_card
from flaxlm.interop.family import Family
from flaxlm.interop.files import ADAPTER, has_file
from flaxlm.interop.hub import find_source
from flaxlm.interop.huggingface import describe, read_finite, real_shapes, slice_at, some
from flaxlm.interop.layouts import Dense, Shape, Weight
from flaxlm.interop.safetensors import SINGLE, Tensor, read_header, write_files
from flaxlm.interop.transfer import family_of, new_folder, opened, write_json
from flaxlm.interop.values import Values, read_json
from flaxlm.nn.lora import abstract_adapters, adaptable
from flaxlm.nn.models import abstract_params, boxed_shapes, build_model
from flaxlm.origin import Origin, checkpoint_of, find_origin, located, write_origin
from flaxlm.runs import (
  CHECKPOINTS,
  CONFIG,
  IMPORTED_FILES,
  TOKENIZER,
  load_config_of,
  new_files,
)
from flaxlm.sharding import mesh_for
from flaxlm.tokenizers.imported import SPECIALS

WEIGHTS = "adapter_model.safetensors"
# Of ours, beside the other two: which base an adapter is of. PEFT warns of keys in its own
# file that it does not know, and leaves other files alone.
BASE = "flaxlm_base.json"
PREFIX = "base_model.model."  # of every name
TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}
# What else PEFT's LoRA can be, by key and the values that leave it out.
PLAIN: Mapping[str, tuple] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "use_dora": (False,),
  # Others change the base, too.
  "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
  "alora_invocation_tokens": (None,),
  "modules_to_save": (None, []),
  "lora_bias": (False,),
  "layer_replication": (None, []),
  "trainable_token_indices": (None, []),
  "target_parameters": (None, []),
}


class Module(NamedTuple):
  """One of their linear modules that adapters can change."""

  row: Weight
  place: tuple[int, ...]  # the layer
  kernels: list[Shape]  # of our projections in it

  @property
  def layout(self) -> Dense:
    assert isinstance(self.row.layout, Dense)
    return self.row.layout

  @property
  def projections(self) -> list[str]:
    return [path.removesuffix("/kernel") for path in self.row.ours]

  def outputs(self, rank: int) -> list[Shape]:
    """The shape of each projection's B, for adapters of this rank."""
    return [(rank, *kernel[self.layout.inputs :]) for kernel in self.kernels]

  @property
  def inputs(self) -> Shape:
    return self.kernels[0][: self.layout.inputs]

  @property
  def of_b(self) -> Dense:
    """The layout of B: rank takes the place of a kernel's inputs."""
    return dataclasses.replace(self.layout, inputs=1, transposed=True)


def modules_of(cfg: ResolvedConfig, params: Any, family: Family) -> dict[str, Module]:
  """Every module of `family` that could be adapted, by its name."""
  shapes = real_shapes(cfg.model, flatten_dict(params, sep="/"))
  boxes = flatten_dict(boxed_shapes(build_model(cfg.model, cfg.training)))
  kernels = {"/".join(path) for path in adaptable(boxes)}
  return {
    name.removesuffix(".weight"): Module(
      row, place, [shapes[path][row.stacked :] for path in row.ours]
    )
    for name, (row, place, _) in family.expected(cfg.model.unpadded, shapes).items()
    if not kernels.isdisjoint(row.ours)
  }


# -- To PEFT -------------------------------------------------------------------------------


def export_adapter(
  run: Run, folder: Path, dtype: str | None, license: str | None = None
) -> tuple[Family, list[str]]:
  """Writes a run's adapters as PEFT loads them, and a model card that names the `license`;
  returns the family of their base, and notes for the user.

  Raises `ConfigError` for a run without adapters, and `CheckpointError` if no Hugging Face
  family can express its model.
  """
  lora = run.cfg.lora
  if not lora.rank:
    raise ConfigError(f"{run.path} has no adapters", "leave out --adapter")
  family = family_of(run)
  model = build_model(run.cfg.model, run.cfg.training)
  target = abstract_adapters(model, lora, run.mesh)
  adapters = flatten_dict(restore_params(run.path, run.step, target), sep="/")
  modules = modules_of(run.cfg, run.params, family)
  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  for name, module in modules.items():
    if any(f"{path}/lora_a" in adapters for path in module.projections):
      a, b = to_theirs(module, adapters, lora.rank)
      tensors |= {f"{PREFIX}{name}.lora_{x}.weight": m for x, m in (("A", a), ("B", b))}
      ranks[name] = len(a)
  kind = np.dtype(jax.numpy.dtype(dtype or run.cfg.training.param_dtype))
  fused = {name: rank for name, rank in ranks.items() if rank != lora.rank}
  number = lambda x: int(x) if x == int(x) else x
  with new_folder(folder) as partial:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_files(partial, shapes, kind, 2**62, tensors.__getitem__)
    (partial / SINGLE).rename(partial / WEIGHTS)
    write_json(
      partial / ADAPTER,
      {
        "peft_type": "LORA",
        "task_type": TASKS.get(run.cfg.model.family),
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": number(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": shortest_names(ranks.keys(), modules.keys()),
        "rank_pattern": fused,
        "alpha_pattern": {
          name: number(lora.alpha * rank / lora.rank) for name, rank in fused.items()
        },
        "fan_in_fan_out": not all(modules[name].layout.transposed for name in ranks),
        "bias": "none",
        "inference_mode": True,
      },
    )
    headless = run.cfg.model.family == "encoder" and not run.cfg.model.head_transform
    count = sum(tensor.size for tensor in tensors.values())
    architecture = family.architectures[headless]
    exported = Exported(family.model_type, architecture, count, is_adapter=True)
    write_card(partial, run, exported, license)
    origin = located(run.path)
    if load_config_of(origin.path).lora.rank:  # merging rounds, in its own way each time
      said = f"{origin.path}, with the adapters of that run merged into it"
      return family, [f"{folder} has no digest of its base, which is {said}"]
    base = load_params(origin, abstract_params(model, run.mesh), run.mesh)
    write_json(partial / BASE, {"sha256": digest_of(run.cfg.model, base, family)})
  return family, []


def digest_of(cfg: ResolvedModel, params: Any, family: Family) -> str:
  """What tells a base from others: SHA-256 of all its parameters as `family` has them.

  They are rounded to bfloat16, so that it is the same for a base that was imported in
  another dtype. The mesh and its padding do not matter either.
  """
  digest, export = hashlib.sha256(), describe(cfg, params, family)
  for name in sorted(export.shapes):
    values = np.asarray(export.read(name), jnp.bfloat16, order="C")
    digest.update(f"{name} {[*values.shape]} ".encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def to_theirs(
  module: Module, adapters: Mapping[str, Any], rank: int
) -> tuple[np.ndarray, np.ndarray]:
  """(A, B) of a module, (rank, inputs) and (outputs, rank), from those of our projections,
  one below the other. A projection without an adapter is left as it is by zeros."""
  has = [path for path in module.projections if f"{path}/lora_a" in adapters]
  part = lambda path, x: slice_at(adapters[f"{path}/lora_{x}"], module.place)
  a = [part(path, "a").reshape(-1, rank).T for path in has]
  parts = []
  for path, shape in zip(module.projections, module.outputs(rank * len(has)), strict=True):
    parts.append(np.zeros(shape, np.float32))
    if path in has:
      start = has.index(path) * rank
      parts[-1][start : start + rank] = part(path, "b")
  return np.concatenate(a), module.of_b.to_theirs(parts)


def shortest_names(chosen: Any, every: Any) -> list[str]:
  """The last words of the names, as PEFT's users write them, if they tell the modules from
  all others; else the whole names."""
  last = lambda name: name.rpartition(".")[2]
  short = {last(name) for name in chosen}
  tells = {name for name in every if last(name) in short} == set(chosen)
  # Modules that are no projections of a block may have the same last word: BERT's "dense".
  return sorted(short if tells and "dense" not in short else chosen)


# -- From PEFT -----------------------------------------------------------------------------


def import_adapter(
  folder: Path, run_dir: Path, base: Path, mesh: Mesh
) -> tuple[ResolvedConfig, list[str]]:
  """Makes a run of a PEFT adapter over the run `base`; returns its config, and notes for
  the user.

  Raises `CheckpointError` for an adapter of another base, or of another kind than LoRA.
  """
  if not has_file(folder / ADAPTER):
    raise CheckpointError(
      f"{folder} has no {ADAPTER}", "--base is for adapters: leave it out"
    )
  settings = Values(read_json(folder / ADAPTER), str(folder / ADAPTER))
  for key, plain in PLAIN.items():
    if settings.values.get(key, plain[0]) not in plain:
      raise settings.refused(key, "only plain LoRA of linear modules is read")
  if not has_file(folder / WEIGHTS):
    raise CheckpointError(f"{folder} has no {WEIGHTS}", "save it with safetensors")
  origin = find_origin(Config(name=run_dir.name, init=str(base)))
  before = load_config_of(origin.path)
  model, mesh = build_model(before.model, before.training), mesh_for(mesh, before.model)
  params = abstract_params(model, mesh)
  # Its family decides the names, for which shapes are enough.
  tokenizer: Any = None
  run = Run(origin.path, before, tokenizer, origin.step, model, params, mesh)
  modules = modules_of(before, params, family := family_of(run))
  pairs = dict(read_pairs(folder, settings, modules, family))
  notes = check_base(folder, settings, run, family)
  cfg, adapters = to_ours(settings, modules, pairs)
  target = abstract_adapters(model, cfg, mesh)
  place = lambda x, leaf: jax.device_put(np.asarray(x, leaf.dtype), leaf.sharding)
  adapters = jax.tree.map(place, adapters, target)
  said = save_adapters(run_dir, origin, cfg, adapters)
  return said, notes + keep_documents(folder, run_dir / IMPORTED_FILES / ADAPTER_DOCUMENTS)


def check_base(folder: Path, settings: Values, run: Run, family: Family) -> list[str]:
  """Compares the base that an adapter is of with a run, whose parameters need not be
  loaded; returns a note if nothing tells which it is.

  Raises `CheckpointError` for another base of the same shapes.
  """
  named = settings.values.get("base_model_name_or_path")
  named = named if isinstance(named, str) and named else None
  if has_file(folder / BASE):
    wanted = Values(read_json(folder / BASE), str(folder / BASE)).get(str, "sha256")
    cure = f"name its own run, or remove {folder / BASE} to take this one nevertheless"
  else:
    wanted = digest_of_named(named, run.mesh) if named else None
    cure = f"it says that it is one of {named}"
  if wanted is None:
    said = f"{named}, which it names, is not here" if named else "it names none"
    return [f"{folder}: nothing tells whether {run.path} is the base it is of: {said}"]
  target, of = run.params, checkpoint_of(run.path, run.step)
  if digest_of(run.cfg.model, load_params(of, target, run.mesh), family) != wanted:
    raise CheckpointError(
      f"{folder} is an adapter for another base: the parameters of {run.path} are others",
      cure,
    )
  return []


def digest_of_named(named: str, mesh: Mesh) -> str | None:
  """`digest_of` of a checkpoint by its path or its name on the hub; None if it is not on
  this machine, or cannot be read."""
  try:
    with opened(find_source(named)) as (_, load):
      loaded = load(mesh, None)
  except FlaxLMError:
    return None
  return digest_of(loaded.cfg, loaded.params, loaded.family)


def save_adapters(
  run_dir: Path, origin: Origin, lora: LoraConfig, adapters: Any
) -> ResolvedConfig:
  """Makes a run of adapters over a checkpoint, at step 0; returns its config."""
  cfg = dataclasses.replace(
    load_config_of(origin.path),
    name=run_dir.name,
    runs_dir=str(run_dir.parent),
    init=str(origin.path),
    init_optimizer=False,
    lora=lora,
  )
  with new_folder(run_dir) as partial:
    store = CheckpointStore(partial / CHECKPOINTS)
    try:
      store.save(0, adapters, None, {"step": 0, "corpus": None})
    finally:
      store.close()
    with new_files(partial) as written:
      (written / CONFIG).write_text(to_json(cfg), "utf-8")
      for name in (TOKENIZER, SPECIALS):
        if (origin.path / name).exists():
          shutil.copyfile(origin.path / name, written / name)
      write_origin(written, origin)
  return cfg


class Pair(NamedTuple):
  """The adapter of one module, and the factor of its change."""

  a: np.ndarray  # (rank, inputs)
  b: np.ndarray  # (outputs, rank)
  scale: float


def read_pairs(
  folder: Path, settings: Values, modules: Mapping[str, Module], family: Family
) -> Iterator[tuple[str, Pair]]:
  """The adapter of each module that has one. Raises `CheckpointError` for one that does not
  fit the base."""
  base = settings.values.get("base_model_name_or_path")
  cure = f"it says that it is one of {base}" if base else ""
  tensors = read_header(folder / WEIGHTS)
  found: dict[str, dict[str, Tensor]] = {}
  unexpected = []
  for given, tensor in tensors.items():
    name = given.removeprefix(PREFIX).replace(".default.weight", ".weight")
    stem, _, kind = name.removesuffix(".weight").rpartition(".lora_")
    known = [n for n in (stem, family.prefix + stem) if n in modules]
    if known and kind in ("A", "B"):
      found.setdefault(known[0], {})[kind] = tensor
    else:
      unexpected.append(given)
  if unexpected or not found:
    what = (
      f"the base has no {some(unexpected)}"
      if unexpected
      else "nothing in it is of a module"
    )
    raise CheckpointError(f"{folder} is an adapter for another base: {what}", cure)
  for name, both in found.items():
    if len(both) != 2:
      raise CheckpointError(f"{folder / WEIGHTS}: of {name} there is one of A and B")
    a, b, module = both["A"], both["B"], modules[name]
    inputs = math.prod(module.inputs)
    outputs = sum(math.prod(shape) for shape in module.outputs(1))
    rank = a.shape[0] if a.shape else 0
    if a.shape != (rank, inputs) or b.shape != (outputs, rank) or not rank:
      raise CheckpointError(
        f"{folder} is an adapter for another base: of {name} it has {list(a.shape)} and "
        f"{list(b.shape)}, not [{rank}, {inputs}] and [{outputs}, {rank}]",
        cure,
      )
    if not settings.values.get("rank_pattern") and settings.values.get("r", 8) != rank:
      raise settings.refused("r", f"of {name} the rank is {rank}")
    wide = lambda tensor, name=name: read_finite(tensor, name).astype(np.float32)
    yield name, Pair(wide(a), wide(b), scale_of(settings, name, rank))


def scale_of(settings: Values, name: str, rank: int) -> float:
  """alpha / rank of a module, or alpha / sqrt(rank) if PEFT had been told so."""
  patterns = settings.get(dict, "alpha_pattern", None) or {}
  alpha = settings.values.get("lora_alpha", 8)
  for pattern, value in patterns.items():
    if not re.fullmatch(r"[\w.]+", pattern):
      raise settings.refused("alpha_pattern", "only names of modules are read")
    if name == pattern or name.endswith(f".{pattern}"):
      alpha = value
      break
  if not isinstance(alpha, int | float) or not math.isfinite(alpha):
    raise settings.refused("lora_alpha", "it must be a number")
  return alpha / (math.sqrt(rank) if settings.values.get("use_rslora") else rank)


def to_ours(
  settings: Values, modules: Mapping[str, Module], pairs: Mapping[str, Pair]
) -> tuple[LoraConfig, Any]:
  """Our config of adapters, and the adapters on the host.

  All have the largest rank of theirs, filled up with zeros, and the commonest scale: that
  of others is in their B. A layer without an adapter has one of zeros.
  """
  rank = max(len(pair.a) for pair in pairs.values())
  ((scale, _),) = Counter(pair.scale for pair in pairs.values()).most_common(1)
  scale = scale or 1.0
  layers: Counter[str] = Counter()
  for module in modules.values():
    layers.update({path: 1 for path in module.projections})
  flat: dict[str, np.ndarray] = {}
  for name, pair in pairs.items():
    module, own = modules[name], len(pair.a)
    a = pair.a.T.reshape(*module.inputs, own)
    parts = module.of_b.to_ours(pair.b * (pair.scale / scale), module.outputs(own))
    for path, b, shape in zip(module.projections, parts, module.outputs(rank), strict=True):
      count = layers[path]
      whole = ((*module.inputs, rank), shape)
      for x, inner in zip("ab", whole, strict=True):
        flat.setdefault(f"{path}/lora_{x}", np.zeros((count, *inner), np.float32))
      flat[f"{path}/lora_a"][module.place][..., :own] = a
      flat[f"{path}/lora_b"][module.place][:own] = b
  paths = sorted({path.rpartition("/")[0] for path in flat})
  dropout = settings.values.get("lora_dropout", 0.0)
  if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
    raise settings.refused("lora_dropout", "it must be a rate below 1")
  cfg = LoraConfig(
    rank=rank,
    alpha=float(scale * rank),
    targets=f"^({'|'.join(paths)})$",
    dropout=float(dropout),
  )
  return cfg, unflatten_dict(flat, sep="/")
