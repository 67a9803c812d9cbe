# SPDX-License-Identifier: Apache-2.0
"""What a compiled program sends between devices, read from its HLO text."""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

# Of each kind: what one of n devices sends / the bytes of the result, which is the gathered
# or the scattered array.
SENT: Mapping[str, Callable[[int], float]] = {
  "all-gather": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: n - 1,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}

ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}  # else in the name


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind over the same mesh axes, in one run of the program.

  `bytes` is what one device sends in all of them together, by the ring algorithm.
  """

  kind: str
  axes: str
  count: int
  bytes: int


def find_collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
  """The collectives of a program, largest first; in a loop, once for each iteration."""
  computations = dict(_computations(text))
  runs = _runs(text, computations)
  counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
  for computation, lines in computations.items():
    groups_of = {}  # an async collective's groups are in its start, its result in its end
    for line in lines:
      found = re.match(
        rf"\s*(?:ROOT )?%?(\S+) = (.*?) ({'|'.join(SENT)})(-start|-done)?\(%?([\w.\-]+)",
        line,
      )
      if not found:
        continue
      name, shape, kind, stage, operand = found.groups()
      if stage == "-start":
        groups_of[name] = line
        continue
      groups = _groups(groups_of[operand] if stage else line, sizes)
      axes, size = _axes_of(groups, sizes)
      if size == 1:
        continue
      result_bytes = _shape_bytes(shape)
      if computation.startswith("all-reduce-scatter"):  # TPU programs write it like this
        if kind == "all-reduce":  # its result is not scattered yet
          result_bytes //= size
        kind = "reduce-scatter"
      entry = counts[kind, axes]
      entry[0] += runs[computation]
      entry[1] += runs[computation] * round(SENT[kind](size) * result_bytes)
  rows = [Collective(kind, axes, *entry) for (kind, axes), entry in counts.items()]
  return sorted(rows, key=lambda row: -row.bytes)


def _shape_bytes(shape: str) -> int:
  total = 0
  for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
    bits = ITEM_BITS.get(dtype) or int((re.findall(r"\d+", dtype) or [32])[0])
    total += math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
  return total


# -- Groups ------------------------------------------------------------------------------


def _groups(line: str, sizes: Mapping[str, int]) -> Sequence[Sequence[int]]:
  """The groups of devices that exchange data, by their numbers in the mesh."""
  named = re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{(.*?)\}", line)
  if named:
    return _named_groups(*named.groups())
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
  if iota:
    return _iota(*iota.groups()[1:]).reshape(_numbers(iota[1])).tolist()
  listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
  if listed:
    return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
  return [
    list(range(math.prod(sizes.values())))
  ]  # no groups are given: all devices are one


def _named_groups(axes: str, order: str, used: str) -> Sequence[Sequence[int]]:
  """Groups along the axes `used` of the compiler's own mesh, such as 'a'=4,'b'=2."""
  dims = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
  table = np.arange(math.prod(dims.values()))
  listed = re.search(r"device_ids=\(([\d,]+)\)", order)
  iota = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order)
  if listed:
    table = np.array(_numbers(listed[1]))
  elif iota:
    table = _iota(*iota.groups())
  table = table.reshape(list(dims.values()))
  names = re.findall(r"'(\w+)'", used)
  places = [n for n, name in enumerate(dims) if name not in names]
  places += [n for n, name in enumerate(dims) if name in names]
  size = math.prod(dims[name] for name in names)
  return table.transpose(places).reshape(-1, size).tolist()


def _iota(dims: str, order: str | None) -> np.ndarray:
  """0, 1, 2, ... laid out in `dims` and transposed."""
  shape = _numbers(dims)
  table = np.arange(math.prod(shape)).reshape(shape)
  return table if order is None else table.transpose(_numbers(order))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]


def _axes_of(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> tuple[str, int]:
  """The mesh axes along which members of a group differ, and the size of a group."""
  shape, used = list(sizes.values()), set()
  for group in groups:
    places = np.array(np.unravel_index(list(group), shape)).T
    for one, other in itertools.pairwise(places):
      used |= {axis for axis, a, b in zip(sizes, one, other, strict=True) if a != b}
  return "+".join(axis for axis in sizes if axis in used), max(map(len, groups), default=1)


# -- How often -----------------------------------------------------------------------------


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
  name, lines = "", list[str]()
  for line in text.splitlines():
    if line.startswith("}"):
      yield name, lines
    elif line and not line[0].isspace() and line.endswith("{"):
      name, lines = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0], []
    else:
      lines.append(line)


def _runs(text: str, bodies: Mapping[str, Sequence[str]]) -> dict[str, int]:
  """How often each computation runs; one that a loop calls runs once per iteration."""
  entry = re.search(r"^ENTRY %?(\S+) ", text, re.MULTILINE)
  runs: dict[str, int] = defaultdict(int)

  def visit(name: str, times: int) -> None:
    runs[name] += times
    for line in bodies.get(name, []):
      rounds = 1
      loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
      if loop:
        rounds = _rounds(line, bodies.get(loop[1], []), bodies.get(loop[2], []))
      for called in re.findall(r"(?:calls|body|to_apply)=%?([\w.\-]+)", line):
        visit(called, times * rounds)
      for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
        for called in re.findall(r"[\w.\-]+", branches):
          visit(called, times)

  if entry:
    visit(entry[1], 1)
  return runs


def _rounds(line: str, condition: Sequence[str], body: Sequence[str]) -> int:
  """The iterations of a loop: as the compiler says, else the constant that its counter is
  compared with, divided by the counter's step.
  """
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  text = "\n".join(condition)
  limits = [int(n) for n in re.findall(r"constant\((\d+)\)", text)]
  counter = re.search(r"get-tuple-element\(.*?\), index=(\d+)", text)
  step = _step(body, int(counter[1])) if counter else 1
  return max(1, -(-max(limits, default=1) // step))


def _step(body: Sequence[str], place: int) -> int:
  """What a loop adds to its counter, the element number `place` of the tuple it carries."""
  made = {}  # the instruction that computes each name
  for line in body:
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)", line)
    if found:
      made[found[1]] = found[2]
  root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
  carried = re.search(r" tuple\((.*?)\)", root)
  names = re.findall(r"%([\w.\-]+)", carried[1]) if carried else []
  step = 0
  while place < len(names):
    added = re.search(r" add\(%([\w.\-]+), %([\w.\-]+)\)", made.get(names[place], ""))
    if not added:
      break
    constants = [
      re.search(r" constant\((\d+)\)", made.get(name, "")) for name in added.groups()
    ]
    step += sum(int(constant[1]) for constant in constants if constant)
    names[place] = added[1] if constants[1] else added[2]
  return max(1, step)
