# SPDX-License-Identifier: Apache-2.0
"""The rules of the house (docs/design.md, sections 3 and 7), checked on the source itself.

A test names every place that breaks its rule, not only the first.
"""

import ast
import functools
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from flaxlm.config import Config, knobs
from flaxlm.sharding import FIELDS, RULES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flaxlm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
DOORS = [ROOT / "train.py", ROOT / "infer.py"]
TREES = {path: ast.parse(path.read_text("utf-8")) for path in [*SOURCES, *DOORS]}
EVERY_FILE = [
  *SOURCES,
  *DOORS,
  *sorted((ROOT / "configs").rglob("*.py")),
  *sorted((ROOT / "benchmarks").rglob("*.py")),
  *sorted((ROOT / "tests").rglob("*.py")),
  *sorted((ROOT / "docs").rglob("*.py")),
]

# Who may import whom, wherever in a file the import stands: a folder, or a file beside
# them, imports from the rows above its own and from itself.
ROWS = [
  ["errors", "strict_json", "version"],
  ["config"],
  ["checkpoint", "devices", "distributed", "platform", "sharding", "tokenizers"],
  ["runs"],
  ["chat"],
  ["origin"],
  ["data", "nn"],
  ["cost", "decoding"],
  ["interop", "training"],
  ["planning"],
  ["look"],
  ["api", "benchmark", "serving", "verify"],
  ["commands"],
  ["", "cli"],  # "" is flaxlm/__init__.py, which offers names of `api`
]
# Inside nn there are rows too.
NN_ROWS = [
  ["masks", "vocabulary", "execution", "pipeline"],
  ["kernels"],
  ["quantized"],
  ["layers", "positions", "cache"],
  ["base"],
  ["attention", "moe"],
  ["block"],
  ["stack", "rnn"],
  ["models"],
  ["lora"],
]

BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def relative(path: Path) -> str:
  return str(path.relative_to(ROOT))


def at(path: Path, node: ast.AST, what: str = "") -> str:
  """Where a rule is broken, and by what."""
  line = getattr(node, "lineno", 1)
  return f"{relative(path)}:{line}{what and ': '}{what}"


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


def folder(module: str) -> str:
  """The folder of a module, or the file itself where it lies beside the folders."""
  return module.partition(".")[0]


def imports_of_modules() -> dict[str, set[str]]:
  """The other modules that each module imports, lazily or not."""
  return {
    module: {other for other, _ in imported_modules(TREES[path])} - {module}
    for module, path in MODULES.items()
  }


def imports_of_folders() -> dict[str, set[str]]:
  """The other folders that each folder imports, lazily or not."""
  graph: dict[str, set[str]] = {folder(module): set() for module in MODULES}
  for module, others in imports_of_modules().items():
    graph[folder(module)] |= {folder(other) for other in others} - {folder(module)}
  return graph


def in_circles(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
  """The part of a graph that is in a circle or between two circles."""
  graph = dict(graph)
  while True:
    needed = set().union(*graph.values())
    left = {
      name: needs & graph.keys()
      for name, needs in graph.items()
      if needs & graph.keys() and name in needed
    }
    if left == graph:
      return graph
    graph = left


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


def test_every_folder_stands_in_one_row():
  named = [name for names in ROWS for name in names]
  assert len(named) == len(set(named))
  assert {folder(module) for module in MODULES} <= set(named)


def test_imports_go_down_the_rows():
  rows = {name: number for number, names in enumerate(ROWS) for name in names}
  wrong = [
    at(path, node, f"{module} imports {other or 'flaxlm'}")
    for module, path in MODULES.items()
    for other, node in imported_modules(TREES[path])
    if folder(other) != folder(module) and rows[folder(other)] >= rows[folder(module)]
  ]
  assert not wrong


def test_planning_knows_the_step_and_not_the_loop():
  names = ("logprobs", "losses", "optimizer", "step")
  known = tuple(f"training.{name}" for name in names)
  wrong = [
    at(path, node, f"{module} imports {other}")
    for module, path in MODULES.items()
    if folder(module) == "planning"
    for other, node in imported_modules(TREES[path])
    if folder(other) == "training" and other not in known
  ]
  assert not wrong


def test_inside_nn_masks_come_before_kernels_before_layers_before_models():
  rank = {f"nn.{name}": n for n, names in enumerate(NN_ROWS) for name in names}
  rank["nn"] = -1
  room = lambda module: ".".join(module.split(".")[:2])  # kernels/ is one room
  wrong = [
    at(path, node, f"{module} imports {other}")
    for module, path in MODULES.items()
    if folder(module) == "nn"
    for other, node in imported_modules(TREES[path])
    if folder(other) == "nn"
    and rank[room(other)] >= rank[room(module)]
    and not room(other) == room(module) == "nn.kernels"
  ]
  assert not wrong


def test_inside_benchmark_the_core_comes_before_peers_before_suites():
  rooms = ["peers", "suites"]

  def rank(module: str) -> int:
    room = module.split(".")[1:2]
    return 1 + rooms.index(room[0]) if room and room[0] in rooms else 0

  wrong = [
    at(path, node, f"{module} imports {other}")
    for module, path in MODULES.items()
    if folder(module) == "benchmark"
    for other, node in imported_modules(TREES[path])
    if folder(other) == "benchmark" and rank(other) > rank(module)
  ]
  assert not wrong


def test_the_package_imports_nothing_that_stays_outside_the_wheel():
  outside = {"benchmarks", "configs", "tests"}
  wrong = [
    at(path, node, name)
    for path in SOURCES
    for name, node in imports(TREES[path])
    if name.split(".")[0] in outside
  ]
  assert not wrong


@pytest.mark.parametrize("graph", [imports_of_modules, imports_of_folders])
def test_no_imports_go_in_a_circle(graph):
  """A lazy import counts: two files that need each other are one file."""
  assert not in_circles(graph())


def test_circles_are_found():
  graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": set()}
  assert in_circles(graph) == {"b": {"c"}, "c": {"b"}}


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
# The library makes the tables of splash's blocks on the host, out of answers in numpy.
ALLOWED = {("nn.kernels.splash", "numpy")}


def test_what_a_part_must_not_load():
  assert set(FORBIDDEN) <= {folder(module) for module in MODULES}
  wrong = [
    at(path, node, name)
    for module, path in MODULES.items()
    for name, node in imports(TREES[path])
    if name.split(".")[0] in FORBIDDEN.get(folder(module), ())
    and (module, name) not in ALLOWED
  ]
  assert not wrong


def test_nn_knows_nothing_of_the_experiment():
  """Modules take numbers: a `ModelConfig`, never the whole config, files or devices."""
  wrong = [
    at(path, node)
    for module, path in MODULES.items()
    if folder(module) == "nn"
    for name, node in imports(TREES[path])
    if name in ("flaxlm.config.Config", "flaxlm.config.ResolvedConfig")
  ]
  assert not wrong


def test_nn_asks_no_device():
  """What the devices can do comes in as a value; the compiler's own choice by platform
  (`jax.lax.platform_dependent`) is none of these."""
  asking = {"devices", "local_devices", "device_count", "local_device_count"}
  asking |= {"default_backend", "process_count", "process_index"}
  wrong = []
  for module, path in MODULES.items():
    if folder(module) == "nn":
      for name, node in imports(TREES[path]):
        first, *rest = name.split(".")
        if name.startswith("flaxlm.platform") or (first == "jax" and asking & {*rest}):
          wrong.append(at(path, node, name))
      for node in ast.walk(TREES[path]):
        called = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if called in {f"jax.{name}" for name in asking}:
          wrong.append(at(path, node, called))
  assert not wrong


def test_a_command_imports_what_it_needs_when_it_runs():
  allowed = ("commands.parsing", "config", "errors", "strict_json")
  wrong = [
    at(path, node, other)
    for module, path in MODULES.items()
    if folder(module) == "commands"
    for other, node in imported_modules(TREES[path])
    if node in at_top(TREES[path]) and other not in allowed
  ]
  assert not wrong


def test_one_module_knows_orbax():
  users = {
    module
    for module, path in MODULES.items()
    if any(name.split(".")[0] == "orbax" for name, _ in imports(TREES[path]))
  }
  assert users == {"checkpoint.store"}


# -- Names, licences, and what a file may do -----------------------------------------------


def test_the_first_line_is_the_licence():
  licence = "# SPDX-License-Identifier: Apache-2.0"
  wrong = []
  for path in EVERY_FILE:
    lines = path.read_text("utf-8").splitlines() or [""]
    if licence != lines[lines[0].startswith("#!")]:
      wrong.append(relative(path))
  assert not wrong


def test_every_file_says_what_it_is():
  assert not [relative(path) for path in SOURCES if not ast.get_docstring(TREES[path])]


def test_doors_are_thin():
  """They say what they are, call the command, and define nothing themselves."""
  for path in DOORS:
    names = [name for name, _ in imports(TREES[path])]
    assert names == ["sys", "flaxlm.cli.main"], relative(path)
    own = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [at(path, node) for node in ast.walk(TREES[path]) if isinstance(node, own)]


def test_there_is_no_drawer_for_everything():
  names = {path.stem for path in SOURCES}
  assert not names & {"util", "utils", "helpers", "misc", "common"}


def runs_what_it_reads(path: Path) -> Iterator[str]:
  """Where a file makes code of data."""
  for name, node in imports(TREES[path]):
    banned = set(name.split(".")) & BANNED_MODULES or name == "importlib.import_module"
    if banned or name.endswith("serialize_executable"):
      yield at(path, node, name)
  for node in ast.walk(TREES[path]):
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      if called in BANNED_CALLS or called in ("torch.load", "os.system"):
        yield at(path, node, called)
      for keyword in node.keywords:
        allowed = ast.unparse(keyword.value) == "False"
        if keyword.arg in ("allow_pickle", "shell") and not allowed:
          yield at(path, node, f"{called}({keyword.arg}=...)")


def test_nothing_runs_what_it_reads():
  """No pickle, no eval: data never becomes code (a config file is code, by choice)."""
  assert not [place for path in [*SOURCES, *DOORS] for place in runs_what_it_reads(path)]


# What these print is read by Python, which knows NaN: each is its own child process.
THEIR_OWN_READERS = {"benchmark.suites.compile", "benchmark.suites.train"}
THEIR_OWN_READERS |= {"chat.template"}  # a model reads it, as transformers writes it


def test_what_is_written_as_json_is_json():
  """NaN and Infinity are not: `strict_json.to_json` writes null."""
  writers = {"print", "write", "writelines", "write_text", "write_atomically"}
  name = lambda call: ast.unparse(call.func).rpartition(".")[2]
  wrong = [
    at(path, inner)
    for module, path in MODULES.items()
    if module not in THEIR_OWN_READERS
    for node in ast.walk(TREES[path])
    if isinstance(node, (ast.Call, ast.Return))
    and (isinstance(node, ast.Return) or name(node) in writers)
    for inner in ast.walk(node)
    if isinstance(inner, ast.Call)
    and ast.unparse(inner.func) == "json.dumps"
    and "allow_nan" not in {keyword.arg for keyword in inner.keywords}
    and not isinstance(inner.args[0], ast.List)  # of a key, hashed
  ]
  assert not wrong


def test_nothing_is_decided_at_import():
  """No device, environment, thread or file is touched by importing a module."""
  effects = ("jax.devices", "jax.device_count", "jax.config.update", "os.environ")
  effects += ("threading.Thread", "jax.local_devices", "os.putenv", "os.getenv")
  # A function's body does not run; a class's statements come by themselves.
  skipped = (ast.FunctionDef, ast.ClassDef, ast.If)
  wrong = [
    at(path, node)
    for path in SOURCES
    for node in at_top(TREES[path])
    if not isinstance(node, skipped)
    and any(effect in ast.unparse(node) for effect in effects)
  ]
  assert not wrong


# -- Nothing is said and not meant ---------------------------------------------------------


def attributes_read() -> set[str]:
  """Every `x.name` that the package reads, apart from the fields' own definitions.

  A property of a config that others read may read fields for them.
  """
  in_config = {path for path in SOURCES if folder(module_name(path)) == "config"}
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


def test_every_config_field_is_read_somewhere():
  """A field that has one choice has nothing to be read, until it gets a second."""
  read = attributes_read()
  choices = lambda kind: len(typing.get_args(kind))
  fields = [name for name, kind, _ in knobs(Config) if choices(kind) != 1]
  assert not [name for name in fields if name.split(".")[-1] not in read]


def logical_names() -> set[str]:
  """Every logical axis name that stands in nn/, as a parameter's or in `constrain`."""
  found = set()
  for module, path in MODULES.items():
    if folder(module) != "nn":
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


def test_the_package_shows_its_names_before_it_loads_them():
  then = 'assert {"Model", "load", "__version__"} <= {*dir(flaxlm)}'
  loaded = loaded_by("import flaxlm", f"{then}\nassert not hasattr(flaxlm, 'nothing')")
  assert {name for name in loaded if name.startswith("flaxlm")} == {
    "flaxlm",
    "flaxlm.version",
  }
  untouched = (
    "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()"
  )
  loaded = loaded_by("from flaxlm import load", untouched)
  assert {"jax", "flaxlm.api"} <= loaded
  assert not loaded & {"tensorflow", "torch", "matplotlib", "pandas", "orbax.experimental"}


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
