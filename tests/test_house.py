# SPDX-License-Identifier: Apache-2.0
"""The rules of the house (DESIGN, sections 3 and 7), read off the source itself."""

import ast
import functools
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from flaxlm.config import Config, knobs
from flaxlm.sharding import FIELDS, RULES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flaxlm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}
DOORS = [ROOT / "train.py", ROOT / "infer.py"]
EVERY_FILE = [
  *SOURCES,
  *DOORS,
  *sorted((ROOT / "configs").rglob("*.py")),
  *sorted((ROOT / "tests").rglob("*.py")),
]

# Who may import whom: only from a lower row, or from the same folder.
ROWS = [
  ["", "errors", "config"],
  ["platform", "sharding", "tokenizers", "distributed", "checkpoint", "runs"],
  ["nn", "data"],
  ["training.losses", "training.optimizer", "training.step", "decoding"],
  ["planning", "interop"],
  ["training", "benchmark", "look"],
  ["commands"],
  ["cli"],
]
# Inside nn there are rows too.
NN_ROWS = [
  ["cache", "layers", "pipeline", "positions", "vocabulary"],
  ["base"],
  ["attention", "moe"],
  ["stack"],
  ["rnn"],
  ["models"],
]

MOST_LINES = 600
MOST_FUNCTION_LINES = 70
MOST_ARGUMENTS = 8
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def relative(path: Path) -> str:
  return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
  """`nn.layers` for flaxlm/nn/layers.py; "" for the package itself."""
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
  """Full name of everything imported anywhere in a file, and the statement."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name, node) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
  """Our own modules that a file imports, without the leading `flaxlm`."""
  for name, node in imports(tree):
    first, *parts = name.split(".")
    if first == "flaxlm":
      while parts and ".".join(parts) not in MODULES:  # a function of the module
        parts.pop()
      yield ".".join(parts), node


def row(module: str) -> int:
  """The row of a module, or of the nearest package that has one."""
  while True:
    found = [number for number, names in enumerate(ROWS) if module in names]
    if found:
      return found[0]
    assert module, "every module stands in a row"
    module = module.rpartition(".")[0]


def package(module: str) -> str:
  return module.partition(".")[0]


@functools.cache
def at_top(tree: ast.Module) -> set[ast.stmt]:
  """The statements that run when the file is imported."""
  return {
    node for stmt in tree.body for node in ast.walk(stmt) if isinstance(node, ast.stmt)
  } - {
    inner
    for function in functions(tree)
    for stmt in function.body
    for inner in ast.walk(stmt)
    if isinstance(inner, ast.stmt)
  }


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      yield node


# -- Who imports whom ----------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_downwards(path: Path):
  me = module_name(path)
  if me == "":
    assert not list(imported_modules(TREES[path]))
    return
  for other, node in imported_modules(TREES[path]):
    same = package(me) == package(other) and row(other) <= row(me)
    ground = {me.partition(".")[0], other} == {"config", "errors"} and other == "errors"
    assert same or ground or row(other) < row(me), (
      f"{relative(path)}:{node.lineno}: {me} may not import {other or 'flaxlm'}"
    )


def test_every_module_has_a_row_of_its_own_or_of_its_package():
  for module in MODULES:
    assert module == "" or row(module) > 0 or package(module) in ROWS[0], module


def test_inside_nn_layers_come_before_attention_before_models():
  rank = {f"nn.{name}": n for n, names in enumerate(NN_ROWS) for name in names}
  for module, path in MODULES.items():
    if package(module) != "nn" or module == "nn":
      continue
    for other, node in imported_modules(TREES[path]):
      if package(other) == "nn":
        assert rank[other] < rank[module], f"{relative(path)}:{node.lineno}"


def test_no_imports_go_in_a_circle():
  """Counting only what runs at import; a circle would depend on who comes first."""
  graph = {
    module: {
      other
      for other, node in imported_modules(TREES[path])
      if node in at_top(TREES[path]) and other != module
    }
    for module, path in MODULES.items()
  }
  while graph:
    leaves = {module for module, needs in graph.items() if not needs & graph.keys()}
    assert leaves, f"in a circle: {sorted(graph)}"
    graph = {module: needs for module, needs in graph.items() if module not in leaves}


# What each part may never load, by the first word of the import.
FORBIDDEN = {
  "": {"jax", "flax", "numpy", "optax", "orbax", "grain", "tensorflow"},
  "config": {"jax", "flax", "numpy", "optax", "orbax", "grain", "tensorflow"},
  "errors": {"jax", "flax", "numpy"},
  "cli": {"jax", "flax", "numpy"},
  "commands": {"jax", "flax", "numpy"},
  "data": {"jax", "flax", "optax", "orbax", "torch", "tensorflow"},
  "tokenizers": {"jax", "flax", "optax", "orbax", "torch", "tensorflow"},
  "nn": {"os", "pathlib", "io", "optax", "orbax", "grain", "numpy"},
  "sharding": {"optax", "orbax", "grain"},
}


@pytest.mark.parametrize("part", FORBIDDEN)
def test_what_a_part_must_not_load(part: str):
  paths = [path for module, path in MODULES.items() if package(module) == part]
  assert paths
  for path in paths:
    for name, node in imports(TREES[path]):
      assert name.split(".")[0] not in FORBIDDEN[part], f"{relative(path)}:{node.lineno}"


def test_nn_knows_nothing_of_the_experiment():
  """Modules take numbers: a `ModelConfig`, never the whole config, files or devices."""
  for module, path in MODULES.items():
    if package(module) == "nn":
      for name, node in imports(TREES[path]):
        assert name != "flaxlm.config.Config", f"{relative(path)}:{node.lineno}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "commands").glob("*.py")), ids=relative)
def test_a_command_imports_what_it_needs_when_it_runs(path: Path):
  top = at_top(TREES[path])
  for other, node in imported_modules(TREES[path]):
    if node in top:
      assert other in ("", "commands.parsing", "config", "errors"), (
        f"{relative(path)}:{node.lineno}"
      )


def test_one_module_knows_orbax():
  users = {
    module
    for module, path in MODULES.items()
    if any(name.split(".")[0] == "orbax" for name, _ in imports(TREES[path]))
  }
  assert users == {"checkpoint.store"}


# -- Sizes, names, licences ----------------------------------------------------------------


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_the_first_line_is_the_licence(path: Path):
  lines = path.read_text("utf-8").splitlines()
  assert lines[lines[0].startswith("#!")] == "# SPDX-License-Identifier: Apache-2.0"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_is_too_long(path: Path):
  assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_function_is_too_long_or_takes_too_much(path: Path):
  for function in functions(TREES[path]):
    where = f"{relative(path)}:{function.lineno} {function.name}"
    args = function.args
    names = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    names = [name for name in names if name.arg not in ("self", "cls")]
    assert len(names) <= MOST_ARGUMENTS, f"{where} takes {len(names)} arguments"
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    assert lines <= MOST_FUNCTION_LINES or module_name(path) == "training.loop", (
      f"{where} has {lines} lines"
    )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_file_says_what_it_is(path: Path):
  assert ast.get_docstring(TREES[path])


@pytest.mark.parametrize("path", DOORS, ids=relative)
def test_doors_are_thin(path: Path):
  assert len(path.read_text("utf-8").splitlines()) <= 30


def test_there_is_no_drawer_for_everything():
  names = {path.stem for path in SOURCES}
  assert not names & {"util", "utils", "helpers", "misc", "common"}


@pytest.mark.parametrize("path", [*SOURCES, *DOORS], ids=relative)
def test_nothing_runs_what_it_reads(path: Path):
  """No pickle, no eval: data never becomes code (a config file is code, by choice)."""
  tree = ast.parse(path.read_text("utf-8"))
  for name, node in imports(tree):
    parts = set(name.split("."))
    assert not parts & BANNED_MODULES, f"{relative(path)}:{node.lineno}: {name}"
    assert name != "importlib.import_module", f"{relative(path)}:{node.lineno}"
    assert not name.endswith("serialize_executable"), f"{relative(path)}:{node.lineno}"
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      where = f"{relative(path)}:{node.lineno}"
      called = ast.unparse(node.func)
      assert called not in BANNED_CALLS, f"{where}: {called}"
      assert called not in ("torch.load", "os.system"), where
      for keyword in node.keywords:
        if keyword.arg in ("allow_pickle", "shell"):
          assert ast.unparse(keyword.value) == "False", where


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_decided_at_import(path: Path):
  """No device, environment, thread or file is touched by importing a module."""
  effects = ("jax.devices", "jax.device_count", "jax.config.update", "os.environ")
  effects += ("threading.Thread", "jax.local_devices", "os.putenv", "os.getenv")
  for node in at_top(TREES[path]):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)):
      continue  # a function's body does not run; a class's statements come by themselves
    assert not any(effect in ast.unparse(node) for effect in effects), (
      f"{relative(path)}:{node.lineno}"
    )


# -- Nothing is said and not meant ---------------------------------------------------------


def attributes_read() -> set[str]:
  """Every `x.name` of the package that is read, but for the fields' own definitions.

  A property of a config that others read may read fields for them.
  """
  in_config = {path for path in SOURCES if package(module_name(path)) == "config"}
  read = names_read([TREES[path] for path in SOURCES if path not in in_config])
  properties = [
    function
    for path in in_config
    for function in functions(TREES[path])
    if function.name in read and "property" in map(ast.unparse, function.decorator_list)
  ]
  return read | names_read(properties)


def names_read(trees: Sequence[ast.AST]) -> set[str]:
  return {
    node.attr
    for tree in trees
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
  }


# A field that has one choice has nothing to be read, until it gets a second.
@pytest.mark.parametrize(
  "name", [name for name, kind, _ in knobs(Config) if len(typing.get_args(kind)) != 1]
)
def test_every_config_field_is_read_somewhere(name: str):
  assert name.split(".")[-1] in attributes_read()


def logical_names() -> set[str]:
  """Every logical axis name that stands in nn/, as a parameter's or in `constrain`."""
  found = set()
  for module, path in MODULES.items():
    if package(module) != "nn":
      continue
    for node in ast.walk(TREES[path]):
      values: list[ast.expr | None] = []
      if isinstance(node, ast.Call) and ast.unparse(node.func) == "constrain":
        values = [*node.args[1:]]
      elif isinstance(node, ast.Tuple):
        values = [*node.elts]
        if not all(
          isinstance(x, ast.Constant) and isinstance(x.value, str) for x in values
        ):
          continue
      elif isinstance(node, ast.Dict):
        keys = [ast.unparse(key) if key else "" for key in node.keys]
        values = [
          x for key, x in zip(keys, node.values, strict=True) if key == "nn.PARTITION_NAME"
        ]
      found |= {x.value for x in values if isinstance(x, ast.Constant)}
  return found


def test_every_logical_axis_has_a_rule_and_every_rule_is_used():
  assert logical_names() == set(RULES)


def test_every_field_named_for_an_axis_is_a_config_field():
  known = {name for name, _, _ in knobs(Config)}
  for axis, text in FIELDS.items():
    assert axis in RULES
    assert set(text.split(" / ")) <= known
  assert {name for name, axes in RULES.items() if axes} == set(FIELDS)


# -- What importing costs ------------------------------------------------------------------


def loaded_by(statement: str, then: str = "") -> set[str]:
  """The modules that a fresh process has loaded after a statement."""
  code = f"import sys\n{statement}\n{then}\nprint(*sys.modules, sep='\\n')"
  result = subprocess.run(
    [sys.executable, "-W", "error::DeprecationWarning:flaxlm", "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert result.returncode == 0, result.stderr
  return set(result.stdout.split())


@pytest.mark.parametrize(
  "module",
  [
    *("flaxlm", "flaxlm.config", "flaxlm.errors", "flaxlm.cli"),
    *("flaxlm.distributed.peers", "flaxlm.distributed.launcher"),
  ],
)
def test_the_door_opens_without_jax_or_numpy(module: str):
  loaded = loaded_by(f"import {module}")
  assert module in loaded
  assert not loaded & {"jax", "jaxlib", "flax", "numpy", "optax", "orbax", "torch"}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_needs_no_jax(arguments: list[str]):
  code = (
    "import contextlib, io\nfrom flaxlm import cli\n"
    "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
    f"  cli.main({arguments!r})\n"
  )
  assert not loaded_by(code) & {"jax", "numpy"}


def test_the_loop_imports_no_tensorflow_no_torch_and_starts_no_backend():
  then = (
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge.backends_are_initialized()\n"
    "import threading\n"
    "assert threading.active_count() == 1, threading.enumerate()\n"
  )
  loaded = loaded_by("import flaxlm.training.loop", then)
  assert {"jax", "flaxlm.training.step"} <= loaded
  assert not loaded & {"tensorflow", "torch", "keras", "matplotlib", "pandas"}
