# SPDX-License-Identifier: Apache-2.0
"""Runs the documents: every command and every Python block of the README and of docs/.

The blocks of a page run in order, the slow ones separately, in a folder that holds a small
trained run. A comment on the line before a block, which readers do not see, may say:

    <!-- test: slow -->          runs in the slow tests only
    <!-- test: skip=REASON -->   is not run, for one of `REASONS`

Whatever the comment says, the command line and the config of every flaxlm command must be
accepted. What runs is made small: a few steps of a model with one layer.
"""

import argparse
import collections
import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, commands_in_process, tiny, write_corpus

from flaxlm import cli
from flaxlm.commands.parsing import read_config
from flaxlm.config import Config, knobs, parse_mesh, without

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"sh", "python", "text"}

# Why a block may be left out, and how many blocks are: one more is a decision.
REASONS = {
  "install": ("installs packages; .ci/run runs these", 2),
  "extra": ("needs an optional compiler or package", 5),
  "gpu": ("needs GPUs", 1),
  "hours": ("takes minutes or hours, whatever its size", 3),
  "machines": ("needs several machines", 1),
  "server": ("answers until it is told to end; tests/serving has its own", 3),
  "weights": ("needs a published checkpoint", 5),
}
# Programs of others, which are not run; what they are told of ours is still checked.
INIT = ("init", "init_optimizer")
OTHERS = {"curl", "lm-eval", "pip", "pytest", "python3", "kubectl", "tpu-vm.sh"}


class Block(NamedTuple):
  page: Path
  line: int
  language: str
  text: str
  slow: bool = False
  reason: str | None = None  # why it is not run

  @property
  def where(self) -> str:
    return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
  """The fenced blocks of a page, each with what the comment before it says."""
  fence = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
  text = page.read_text("utf-8")
  for found in fence.finditer(text):
    line = text.count("\n", 0, found.start()) + 1
    before = text[: found.start()].splitlines()[-1:] or [""]
    block = Block(page, line, found[1], found[2])
    if mark := re.fullmatch(r"<!-- test: (slow|skip=(\w+)) -->", before[0]):
      block = block._replace(slow=mark[1] == "slow", reason=mark[2])
    else:
      assert "test:" not in before[0], f"{block.where}: {before[0]}"
    yield block


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
WITH_COMMANDS = sorted({block.page for block in BLOCKS if block.language == "sh"})


def name_of(page: Path) -> str:
  return str(page.relative_to(ROOT))


# -- Command lines -------------------------------------------------------------------------


class Command(NamedTuple):
  """One command of a line: its words, and where its output goes."""

  words: list[str]
  output: str | None = None  # a file
  piped: bool = False  # into the next command


def commands_of(block: Block) -> Iterator[Command]:
  """The commands of a block, of the little shell that the documents use."""
  for line in block.text.replace("\\\n", " ").splitlines():
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
      if word not in ("&&", "|"):
        words.append(word)
      elif words:
        output = words[-1] if words[-2:-1] == [">"] else None
        yield Command(words[: -2 if output else None], output, word == "|")
        words = []


def arguments_of(words: list[str]) -> list[str] | None:
  """The arguments of the `flaxlm` command that some words are; None if they are none."""
  if words[0] in ("srun", "sbatch"):  # the batch script runs `flaxlm train ARGUMENTS`
    return arguments_of(words[1:]) if words[0] == "srun" else ["train", *words[2:]]
  program = Path(words[0]).name
  if program == "flaxlm":
    return words[1:]
  if program.startswith("python") and words[1] in ("train.py", "infer.py"):
    return [words[1].removesuffix(".py"), *words[2:]]
  return None


def parse(arguments: list[str]) -> argparse.Namespace | None:
  """Raises `ConfigError` for what the command would refuse before it does anything."""
  with contextlib.suppress(SystemExit):  # --help
    args, rest = cli.build_parser().parse_known_args(arguments)
    if args.command == "launch":
      parse(args.arguments[args.arguments[:1] == ["--"] :])
    if args.takes_overrides and (args.command != "look" or rest):
      read_config(without(rest, INIT))  # the run to begin from is not there
    else:
      assert not rest, rest
    if getattr(args, "mesh", None):
      parse_mesh(args.mesh)
    return args
  return None


def shrink(arguments: list[str], corpus: str) -> list[str]:
  """The command, small: training keeps what it says of families, meshes and names, with a
  model and a number of steps that take seconds; a verification checks two laws."""
  if arguments[0] == "launch":
    start = arguments.index("--") + 1
    return [*arguments[:start], *shrink(arguments[start:], corpus)]
  if "--bleu" in arguments:
    return [*arguments, "--pairs=4"]
  if arguments[0] == "verify" and "--law" not in arguments:
    return [*arguments, "--law=causal", "--law=layout"]
  if arguments[0] != "train" or "--help" in arguments:
    return arguments
  cfg = read_config(without(arguments[1:], INIT))
  sizes = tiny(
    corpus if cfg.data.corpus == "stdlib" else cfg.data.corpus,
    optimizer__kind="sgd",
    training__num_steps=2,
    training__eval_batches=1,
    model__depth=min(cfg.model.depth, 2) if "--model.depth" in str(arguments) else 1,
    model__context=64,
    data__seq_len=64 if cfg.data.objective == "preference" else 32,  # a pair has two texts
    training__sample_prompt=cfg.training.sample_prompt,
  )
  fields = {size.split("=")[0] for size in sizes}
  if any(word.startswith("--init") for word in arguments):  # it has the model of another
    sizes = [size for size in sizes if not size.startswith(("--model.", "--tokenizer."))]
  name_of_flag = lambda word: "--" + word.split("=")[0].removeprefix("--").replace("-", "_")
  kept = [word for word in arguments if name_of_flag(word) not in fields]
  return [*kept, *sizes]


# -- Everything is accepted ----------------------------------------------------------------


def test_every_block_has_a_language_and_a_reason_from_the_list():
  for block in BLOCKS:
    assert block.language in LANGUAGES, block.where
  found = collections.Counter(block.reason for block in BLOCKS if block.reason)
  assert found == {reason: count for reason, (_, count) in REASONS.items()}


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_every_command_line_is_accepted(page: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.chdir(ROOT)
  for block in (b for b in BLOCKS if b.page == page and b.language == "sh"):
    for command in commands_of(block):
      for word in command.words:
        if word.startswith("docs/") and "*" not in word:
          assert (ROOT / word).exists(), f"{block.where}: {word}"
      arguments = arguments_of(command.words)
      if arguments is not None:
        parse(arguments)
      elif block.reason is None:
        assert command.words[0] in ("echo", "python"), f"{block.where}: {command.words}"
      elif command.words[0] != "echo":
        name = Path(command.words[0]).name
        assert name in OTHERS, f"{block.where}: {name}"


# -- Everything runs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
  """A folder of text."""
  return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def in_process(cache_root: Path) -> Iterator[Callable[..., str]]:
  """Runs commands as the documents have them; its text on stdout."""
  with commands_in_process(cache_root) as command:

    def run(arguments: list[str], stdin: str = "") -> str:
      if arguments[0] == "launch":  # it forks, which a process with JAX in it must not
        words = [sys.executable, "-m", "flaxlm.cli", *arguments]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
      else:
        done = command(*arguments, input=stdin)
      assert done.returncode == 0, f"flaxlm {shlex.join(arguments)}\n{done.stderr}"
      return done.stdout

    yield run


@pytest.fixture(scope="module")
def trained(
  in_process: Callable[..., str], corpus: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  """A folder with `runs/stdlib_tiny`, as the first command of the README leaves it."""
  folder = tmp_path_factory.mktemp("trained")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    in_process(shrink(["train"], corpus))
  return folder


def run_page(page: Path, slow: bool, in_process: Callable[..., str], corpus: str) -> None:
  """Runs the slow blocks of a page, or the others, in the current folder."""
  for block in (b for b in BLOCKS if b.page == page and runs(b, slow)):
    if block.language == "python":
      with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block.text, block.where, "exec"), {"__name__": "documents"})
    else:
      run_commands(block, in_process, corpus)


def runs(block: Block, slow: bool) -> bool:
  runnable = block.language in ("sh", "python") and block.reason is None
  return runnable and block.slow == slow


def run_commands(block: Block, in_process: Callable[..., str], corpus: str) -> None:
  piped = ""
  for command in commands_of(block):
    arguments = arguments_of(command.words)
    if command.words[0] == "echo":
      text = " ".join(command.words[1:]) + "\n"
    elif arguments is None:
      text = run_module(command.words)
    else:
      text = in_process(shrink(arguments, corpus), piped)
    piped = text if command.piped else ""
    if command.output:
      Path(command.output).write_text(text)


def run_module(words: list[str]) -> str:
  """`python -m MODULE ARGUMENTS`."""
  assert words[:2] == ["python", "-m"], words
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", words[2:])
    patch.delitem(sys.modules, words[2], raising=False)  # a test may have imported it
    with contextlib.redirect_stdout(io.StringIO()) as out:
      runpy.run_module(words[2], run_name="__main__", alter_sys=True)
  return out.getvalue()


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """The current folder: what a checkout has, and the trained run."""
  shutil.copytree(trained / "runs", tmp_path / "runs")
  for name in ("docs", "configs", "flaxlm"):
    (tmp_path / name).symlink_to(ROOT / name)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def pages_that_run(slow: bool) -> list[Path]:
  return [page for page in PAGES if any(b.page == page and runs(b, slow) for b in BLOCKS)]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_that_run(slow=False), ids=name_of)
def test_every_block_runs(page: Path, place: Path, in_process, corpus: str):
  run_page(page, False, in_process, corpus)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", pages_that_run(slow=True), ids=name_of)
def test_every_slow_block_runs(page: Path, place: Path, in_process, corpus: str):
  run_page(page, True, in_process, corpus)


# -- What is said is there -----------------------------------------------------------------


def without_blocks(page: Path) -> str:
  return re.sub(r"^```.*\n(?:.*\n)*?```$", "", page.read_text("utf-8"), flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
  """The names that GitHub gives the headings of a page."""
  headings = re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE)
  plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
  return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
  text = without_blocks(page)
  links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
  for link in links:
    if not link.startswith(("http://", "https://")):
      path, _, anchor = link.partition("#")
      target = page.parent / path if path else page
      assert target.exists(), link
      assert not anchor or anchor in anchors(target), link


def test_the_index_has_every_page_and_every_raw_file_is_linked():
  index = (ROOT / "docs/index.md").read_text()
  for page in PAGES[1:]:
    path = str(page.relative_to(ROOT / "docs"))
    assert path == "index.md" or f"]({path})" in index, path
  tables = (ROOT / "docs/benchmarks.md").read_text()
  for raw in (ROOT / "docs/benchmarks").iterdir():
    assert f"](benchmarks/{raw.name})" in tables, raw.name


@pytest.mark.parametrize(
  "page", [page for page in PAGES if page.name != "LOG.md"], ids=name_of
)
def test_fields_and_files_that_are_named_exist(page: Path):
  """Except in the log, which is about the past."""
  fields = {name for name, _, _ in knobs(Config)}
  sections = {name.split(".")[0] for name in fields if "." in name}
  paths = (path.relative_to(ROOT / "flaxlm") for path in (ROOT / "flaxlm").rglob("*.py"))
  modules = {".".join(path.with_suffix("").parts) for path in paths}
  others = {"model.init", "model.apply", "tokenizer.json", "tokenizer.model"}
  for code in re.findall(r"`([^`\n]+)`", without_blocks(page)):
    word = code.removeprefix("--").split("=")[0].split()[0]
    if re.fullmatch(r"(flaxlm|tests|configs|docs)/[\w/.-]+", word):
      assert (ROOT / word).exists(), word
    elif word.split(".")[0] in sections and re.fullmatch(r"\w+(\.\w+)+", word):
      parts = word.split(".")
      prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
      assert word in fields | others or prefixes & modules, word


def test_every_extra_and_every_dependency_has_its_reason():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  readme, extras = (ROOT / "README.md").read_text(), project["optional-dependencies"]
  for requirement in project["dependencies"]:
    assert f"| {re.split(r'[<>=!~ ]', requirement)[0]} |" in readme, requirement
  page = (ROOT / "docs/dependencies.md").read_text()
  for extra in extras:
    assert f"| `{extra}` |" in page, extra
  for path in PAGES:
    for found in re.findall(r"\.\[([\w,-]+)\]", path.read_text("utf-8")):
      assert set(found.split(",")) <= set(extras), f"{name_of(path)}: {found}"


def test_the_map_of_the_readme_is_the_tree():
  """Every name of the map is there, and every part of the package is on the map."""
  text = next(
    b.text for b in BLOCKS if b.page.name == "README.md" and "flaxlm/\n" in b.text
  )
  folders: list[tuple[int, Path]] = [(-1, ROOT)]
  shown = set()
  for line in text.splitlines():
    indent = len(line) - len(line.lstrip())
    while folders[-1][0] >= indent:
      folders.pop()
    for word in re.match(r"\s*((?:\S+ {1,2}(?=\S))*\S*)", line)[1].split():
      if not re.fullmatch(r"[\w.]+(/|\.py)", word):
        break
      path = folders[-1][1] / word
      assert path.exists(), word
      shown.add(path)
    if path.is_dir():
      folders.append((indent, path))
  package = ROOT / "flaxlm"
  parts = {path.parent for path in package.glob("*/*.py")} | set(package.glob("*.py"))
  assert parts - shown == {package / "__init__.py"}


@pytest.mark.slow
def test_metrics_are_as_the_documents_say(trained: Path):
  lines = (trained / "runs/stdlib_tiny/metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  page = (ROOT / "docs/training.md").read_text()
  for name in ("train/loss", "eval/loss", "eval/bits_per_byte"):
    assert any(name in record for record in records)
    assert f"`{name}`" in page


def test_pictures_are_those_that_the_script_makes():
  shown = {
    (page.parent / name).resolve()
    for page in PAGES
    for name in re.findall(r"[(\"]([^()\"]+\.png)[)\"]", page.read_text("utf-8"))
  }
  script = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))
  made = {script["FOLDER"] / f"{name}.png" for name in script["PICTURES"]}
  assert shown == made == set(script["FOLDER"].iterdir())
