# SPDX-License-Identifier: Apache-2.0
"""Fixtures, and the platform, set before anything touches JAX: eight simulated devices or,
for tests that are marked gpu, the one that FLAXLM_TEST_PLATFORM names."""

import atexit
import contextlib
import functools
import gc
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from flaxlm.platform import give_threads

jax.config.update("jax_platforms", os.environ.get("FLAXLM_TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
give_threads(os.environ, 8)
# Tests compare numbers and never time, and so do the commands that they start: a quicker
# compile is worth a slower program. XLA's fusion emitters set up MLIR anew for each fused
# loop: 40 % of a module of laws. Later jaxlibs cannot do without, and abort at the flag.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else "",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_max_isa=AVX2",
  )
)
# Whatever a worker has compiled, or a command that a test started, no other compiles again.
# Made by the first process of the session, which hands it on in the environment.
CACHE = "JAX_COMPILATION_CACHE_DIR"
if CACHE not in os.environ:
  os.environ[CACHE] = tempfile.mkdtemp(prefix="flaxlm-tests-")
  atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# It names what it loads by two hints of the compiler as if the processor lacked them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Jaxprs are many small objects that are not garbage: looking for it takes 9 %.
gc.set_threshold(50_000, 20, 50)
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).parent.parent


# The modules that take longest begin first, so that the workers end together: each worker
# takes a module at a time, and pytest-xdist would go by the number of its tests.
LONGEST = (
  *("test_slow", "test_commands", "test_agreement", "test_training_laws", "test_docs"),
  *("test_decoder_laws", "test_golden", "test_pipeline_laws", "test_family_laws"),
  *("test_moe", "test_attention_kernels", "test_rnn", "test_transfer", "test_beams"),
  *(
    "test_training",
    "test_prefill",
    "test_engine",
    "test_jobs",
    "test_sharding_report",
    "test_step_reference",
  ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  rank = {name: number for number, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """One data directory for all tests that run commands: prepared once, compiled once."""
  return tmp_path_factory.mktemp("data")


@pytest.fixture
def compiled_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
  """What the test starts compiles without the flags above."""
  monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
  monkeypatch.delenv("XLA_FLAGS")


def commands_started(
  folder: Path, data: Path
) -> Callable[..., subprocess.CompletedProcess]:
  """Runs `python -m flaxlm.cli ARGUMENTS` in a folder, as a user would. It has one device:
  a hundred steps take half of what they take on the eight of this process."""

  environment = {
    "FLAXLM_DATA_DIR": str(data),
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "100",
  }

  def run(*arguments: str, env_changes=None, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, "-m", "flaxlm.cli", *map(str, arguments)],
      cwd=folder,
      env=os.environ | environment | (env_changes or {}),
      capture_output=True,
      text=True,
      **{"timeout": 240} | kwargs,
    )

  run.environment = environment
  return run


@pytest.fixture
def flaxlm(tmp_path: Path, cache_root: Path) -> Callable[..., subprocess.CompletedProcess]:
  """Starts commands in an empty folder."""
  return commands_started(tmp_path, cache_root)


@contextlib.contextmanager
def commands_in_process(data: Path) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
  """Runs commands without the two seconds that a start takes; what they change of this
  process is put back. It has eight devices, where a user's would have one."""
  from flaxlm import cli

  options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  options += ("jax_cpu_enable_async_dispatch",)
  before = {name: jax.config.values[name] for name in options}

  def run(*arguments: object, input: str = "") -> subprocess.CompletedProcess:
    words = [str(argument) for argument in arguments]
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode())))
    # Files, not strings: the watchdog writes stacks to the descriptor.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
      with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
          code = cli.main(words)
        except SystemExit as e:  # --help
          code = e.code or 0
      out.seek(0)
      err.seek(0)
      return subprocess.CompletedProcess(words, code, out.read(), err.read())

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("FLAXLM_DATA_DIR", str(data))
    patch.setenv("PYTHONPATH", str(ROOT))  # of processes that a command starts
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("COLUMNS", "100")
    yield run
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # it remembers its folder


@pytest.fixture
def in_process(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache_root: Path
) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
  """`flaxlm` below, but in this process."""
  monkeypatch.chdir(tmp_path)
  with commands_in_process(cache_root) as run:
    yield run


# A parameter of a test, in the slow tests only, or only before a release.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
fuzz = functools.partial(pytest.param, marks=pytest.mark.fuzz)


def beside(*packages: str) -> list[pytest.MarkDecorator]:
  """Marks of tests that compare with other packages: parity, and skipped where one of them
  is absent unless FLAXLM_REQUIRE_PARITY is set. What they warn of is theirs."""
  absent = [name for name in packages if not importlib.util.find_spec(name)]
  skipped = bool(absent) and "FLAXLM_REQUIRE_PARITY" not in os.environ
  return [
    pytest.mark.parity,
    pytest.mark.skipif(skipped, reason=f"needs {' and '.join(absent)}"),
    pytest.mark.filterwarnings("ignore"),
  ]


BESIDE_TRANSFORMERS = beside("torch", "transformers")


def with_transformers(test: Callable[..., None]) -> Callable[..., None]:
  """Marks one test that compares with transformers."""
  return functools.reduce(lambda marked, mark: mark(marked), BESIDE_TRANSFORMERS, test)


def slow_but(fast: Iterable[str], names: Iterable[str]) -> list:
  """Parameters of a test: the names in `fast`, and the others in the slow tests only."""
  return [
    pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names
  ]


def tiny(corpus, **knobs):
  """Arguments of a run of seconds; `knobs` replace its fields, `__` stands for the dot."""
  fields = {
    "data.corpus": corpus,
    "model.depth": 1,
    "model.width": 16,
    "model.num_heads": 2,
    "model.context": 32,
    "data.seq_len": 32,
    "data.batch_size": 8,  # divides over the devices of the tests
    "tokenizer.kind": "byte",
    "training.scanned": True,
    "training.log_every_steps": 1,
    "training.eval_every_steps": 4,
    "training.sample_prompt": "a",
    "checkpoint.every_steps": 3,
  } | {name.replace("__", "."): value for name, value in knobs.items()}
  return [f"--{name}={value}" for name, value in fields.items()]


def write_corpus(folder: Path) -> str:
  """The corpus of a new folder of twelve texts."""
  folder.mkdir(exist_ok=True)
  for number in range(12):
    lines = [f"{a} times {number} is {a * number}.\n" for a in range(40)]
    (folder / f"{number}.txt").write_text("".join(lines))
  return f"files:{folder}"


@pytest.fixture
def corpus(tmp_path):
  """A folder of the user's own text."""
  return write_corpus(tmp_path / "text")
