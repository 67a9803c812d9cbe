# SPDX-License-Identifier: Apache-2.0
"""Laws of a whole run, as `flaxlm train` makes it: one that is killed and goes on, and one
by several processes, are the run that nobody disturbed."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from flaxlm.checkpoint.store import CheckpointStore
from flaxlm.config import (
  OBJECTIVES,
  CheckpointConfig,
  Config,
  DataConfig,
  ModelConfig,
  TokenizerConfig,
  to_json,
)
from flaxlm.errors import INTERRUPTED, PREEMPTED
from flaxlm.nn.models import build_model
from flaxlm.runs import CHECKPOINTS, METRICS, load_config_of
from flaxlm.sharding import batch_shards, make_mesh, mesh_for
from flaxlm.training.loop import train
from flaxlm.training.optimizer import build_optimizer
from flaxlm.training.step import abstract_state
from flaxlm.verify.case import ROUNDING, Case, Finding, Law, does_not_apply, random_tokens
from flaxlm.verify.shrink import SEQ_LEN

STEPS, KILLED_AFTER = 4, 2
LANGUAGE = "zz"  # of pairs that are made up
LONGEST = 300.0  # seconds of several processes, which take some twenty
# What several processes train, in a file that they all read.
SCRIPT = """\
from pathlib import Path
from flaxlm.config import from_json
config = from_json(Path(__file__).with_suffix(".json").read_text("utf-8"), __file__)
"""


class Run(NamedTuple):
  """What a run leaves behind."""

  losses: dict[str, float]  # by kind and step
  state: Sequence[np.ndarray]  # parameters and moments of the last step
  said: str


class Runs(NamedTuple):
  """The run that nobody disturbs, and the same one after it was killed."""

  whole: Run
  resumed: Run
  note: str  # how they are not the config's


# -- The laws ------------------------------------------------------------------------------


def resumed(case: Case) -> Finding:
  """A run that is killed after its first checkpoint and goes on with nothing but what lies
  in its directory: the bits of parameters and moments, and every loss."""
  whole, rest, note = runs_of(case)
  details = []
  if f"at step {KILLED_AFTER}" not in rest.said:
    details.append(f"it did not go on at step {KILLED_AFTER}")
  pairs = zip(rest.state, whole.state, strict=True)
  if differing := sum(not np.array_equal(a, b) for a, b in pairs):
    details.append(f"of the last state {differing} arrays differ")
  apart = [name for name, x in whole.losses.items() if rest.losses.get(name) != x]
  if apart:
    details.append(f"there is another {', '.join(apart[:3])}")
  return Finding(float(differing + len(apart)), note, details)


def processes(case: Case) -> Finding:
  """Two processes on this machine, each with half of the devices: every loss."""
  count = jax.device_count()
  if count % 2:
    return does_not_apply(f"not checked: {count} devices are no two halves")
  whole, _, note = runs_of(case)
  with work_folder() as folder:
    cfg, _ = config_of(case, folder)
    cfg = dataclasses.replace(cfg, simulated_devices=count // 2)
    script = folder / "two.py"
    script.write_text(SCRIPT, "utf-8")
    script.with_suffix(".json").write_text(to_json(cfg), "utf-8")
    command = ["launch", "--processes=2", "--", "train", str(script)]
    try:
      done = subprocess.run(
        [sys.executable, "-m", "flaxlm.cli", *command],
        env=os.environ | for_children(folder),
        capture_output=True,
        text=True,
        timeout=LONGEST,
      )
    except subprocess.TimeoutExpired:
      return does_not_apply(f"not checked: two processes take over {LONGEST:.0f} s here")
    if late := re.search(r"(DEADLINE_EXCEEDED|not all processes).*", done.stderr):
      return does_not_apply(f"not checked: the two do not meet in time: {late[0][:80]}")
    if done.returncode:
      lines = [line for line in done.stderr.splitlines() if "flaxlm: " in line]
      reason = (lines or done.stderr.splitlines() or ["no word"])[0]
      return Finding(0.0, details=[f"exit code {done.returncode}: {reason}"])
    found = losses_of(cfg)
  if found.keys() != whole.losses.keys():
    return Finding(0.0, details=["two processes report other losses than one does"])
  apart = [abs(found[name] - x) / max(1.0, abs(x)) for name, x in whole.losses.items()]
  return Finding(max(apart), note)


# -- Runs ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def runs_of(case: Case) -> Runs:
  """Trains in this process, on all of its devices."""
  with work_folder() as folder:
    cfg, note = config_of(case, folder)
    whole = run(cfg)
    rest = dataclasses.replace(cfg, runs_dir=str(folder / "killed"))
    shutil.copytree(cfg.run_dir, rest.run_dir)
    shutil.rmtree(rest.run_dir / CHECKPOINTS / str(STEPS))
    return Runs(whole, run(rest), note)


def run(cfg: Config) -> Run:
  with tempfile.TemporaryFile("w+") as said:  # the watchdog writes to a descriptor
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      code = train(cfg)
    if code in (PREEMPTED, INTERRUPTED):  # it was this process that was told to stop
      raise KeyboardInterrupt
    assert code == 0, f"exit code {code}"
    said.seek(0)
    return Run(losses_of(cfg), last_state_of(cfg), said.read())


def losses_of(cfg: Config) -> dict[str, float]:
  """Every loss that a run has written, as "train/loss of step 3"."""
  lines = (cfg.run_dir / METRICS).read_text("utf-8").splitlines()
  return {
    f"{kind} of step {record['step']}": record[kind]
    for record in map(json.loads, lines)
    for kind in ("train/loss", "eval/loss")
    if kind in record
  }


def last_state_of(cfg: Config) -> list[np.ndarray]:
  """Parameters and moments as they are stored."""
  stored = load_config_of(cfg.run_dir)
  mesh = mesh_for(make_mesh(cfg.mesh), stored.model)
  model = build_model(stored.model, stored.training)
  target = abstract_state(model, build_optimizer(stored.optimizer, STEPS), mesh)
  store = CheckpointStore(cfg.run_dir / CHECKPOINTS)
  try:
    found = store.restore(STEPS, params=target.params, opt_state=target.opt_state)
  finally:
    store.close()
  trees = {name: found[name] for name in ("params", "opt_state")}
  return jax.tree.leaves(jax.device_get(trees))


def config_of(case: Case, folder: Path) -> tuple[Config, str]:
  """(a run of `STEPS` steps of the small model on made-up text in `folder`, how it differs
  from what the config does), with the config's optimizer, dtypes and dropout."""
  cfg, notes = case.cfg, []
  objective: str = cfg.data.objective
  if objective not in OBJECTIVES.values():
    objective = OBJECTIVES[case.family]
    notes.append(f"it learns {objective}, as {cfg.data.objective} needs another run")
  if cfg.lora.rank:
    notes.append("all parameters learn, as adapters need another run")
  sizes = dict(case.sizes)
  rest, count = math.prod(sizes.values()), jax.device_count()
  if count % rest:
    notes.append(f"mesh data={count}, as {rest} devices are no part of {count}")
    sizes = dict.fromkeys(sizes, 1) | {"data": count}
  else:
    sizes["data"] *= count // rest
  fields = {
    f.name: getattr(case.model_cfg, f.name) for f in dataclasses.fields(ModelConfig)
  }
  parts = min(2, cfg.training.accumulation_steps)
  dtypes = dict(dtype=cfg.training.dtype, param_dtype=cfg.training.param_dtype)
  return Config(
    name="run",
    seed=cfg.seed,
    runs_dir=str(folder / "runs"),
    model=ModelConfig(**fields | dict(vocab_size=None, num_ids=None)),
    tokenizer=TokenizerConfig(kind="byte"),
    data=DataConfig(
      corpus=write_corpus(folder, objective),
      objective=cast(Any, objective),
      seq_len=SEQ_LEN,
      batch_size=math.lcm(8, 2 * batch_shards(sizes), parts),
    ),
    # Without a larger epsilon an update would be the sign of what rounding leaves.
    optimizer=dataclasses.replace(cfg.optimizer, warmup_steps=1, epsilon=1e-3),
    training=dataclasses.replace(
      case.training,
      num_steps=STEPS,
      accumulation_steps=parts,
      log_every_steps=1,
      eval_every_steps=KILLED_AFTER,
      eval_batches=1,
      **cast(Any, dtypes),
      replication_tolerance=1.0,
      sample_prompt="",
    ),
    checkpoint=CheckpointConfig(every_steps=KILLED_AFTER, keep=STEPS),
    mesh={axis: size for axis, size in sizes.items() if size > 1} or {"data": 1},
  ), "; ".join(notes)


# -- Around them ---------------------------------------------------------------------------


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
  """A folder for runs, where also prepared data go, and made-up catalogues are found."""
  with tempfile.TemporaryDirectory(prefix="flaxlm-verify-") as name:
    folder, before = Path(name), os.environ.get(DATA_DIR)
    os.environ[DATA_DIR] = str(folder / "data")
    sys.path.append(str(folder / PACKAGES))
    try:
      yield folder
    finally:
      sys.path.remove(str(folder / PACKAGES))
      del os.environ[DATA_DIR]
      os.environ |= {} if before is None else {DATA_DIR: before}


DATA_DIR = "FLAXLM_DATA_DIR"
PACKAGES = "site-packages"  # only there are catalogues looked for


def for_children(folder: Path) -> Mapping[str, str]:
  """The environment of processes that compile as this one does."""
  here = str(Path(__file__).parent.parent.parent)
  paths = [here, str(folder / PACKAGES), os.environ.get("PYTHONPATH", "")]
  compiled = jax.config.values["jax_compilation_cache_dir"]
  quickly = jax.config.read("jax_disable_most_optimizations")
  return {
    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quickly)),
  } | ({"JAX_COMPILATION_CACHE_DIR": compiled} if compiled else {})


def write_corpus(folder: Path, objective: str) -> str:
  """Made-up text, or pairs of them, in both splits; returns the corpus's name."""
  lines = ["".join(map(chr, 65 + random_tokens(30, seed=90 + n))) for n in range(60)]
  if objective == "seq2seq":
    path = folder / PACKAGES / "locale" / LANGUAGE / "LC_MESSAGES" / "made.mo"
    path.parent.mkdir(parents=True)
    path.write_bytes(catalogue({line: line[::-1] for line in sorted(lines)}))
    return f"gettext:{LANGUAGE}"
  for number, line in enumerate(lines):
    split = "validation" if number % 4 == 0 else "train"
    path = folder / "text" / split / f"{number:02}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{line}\n", "utf-8")
  return f"files:{folder / 'text'}"


def catalogue(messages: Mapping[str, str]) -> bytes:
  """A .mo file of ASCII messages in order (the manual of GNU gettext, section 10.3)."""
  columns = [[*messages], [*messages.values()]]
  count, tables, text = len(messages), [], b""
  start = 28 + 16 * count
  for column in columns:
    for word in column:
      tables += [len(word), start + len(text)]
      text += word.encode() + b"\0"
  header = 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0
  return struct.pack(f"<{7 + len(tables)}I", *header, *tables) + text


LAWS = (
  Law("resumed", "a run that was killed is the same run", resumed, 0.0, "bits"),
  Law("processes", "two processes train as one does", processes, 1e-4, ROUNDING),
)
