# SPDX-License-Identifier: Apache-2.0
"""Strings of JSON as regular expressions: characters, formats, patterns of schemas."""

import json
import re
import reprlib
from typing import Any, ClassVar, NoReturn

from flaxlm.decoding.json_numbers import any_of
from flaxlm.errors import ConfigError

MOST_REPEATS = 4096
MOST_GROUPS = 32  # of a pattern, within each other

PLAIN = r'[^"\\\x00-\x1f\x7f-\x9f]'  # a character that stands for itself in a JSON string
CHARACTER = rf'(?:{PLAIN}|\\["\\/bfnrt])'

_DAY = (
  "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
  "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"[0-9]{{4}}-{_DAY}"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_HOST = r"[a-z0-9]+(?:-[a-z0-9]+)*(?:\.[a-z0-9]+(?:-[a-z0-9]+)*)*\.[a-z]{2,9}"
FORMATS = {
  "date": _DATE,
  "time": _TIME,
  "date-time": f"{_DATE}T{_TIME}",
  "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
  "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
  "email": rf"[a-z0-9]+(?:[._+-][a-z0-9]+)*@{_HOST}",
  "uri": rf"https?://{_HOST}(?:/[A-Za-z0-9._~-]+)*/?",
}


def literal(value: Any) -> str:
  """An expression for the JSON text of one value."""
  return escaped(text_of(value))


def text_of(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False, allow_nan=False)


def escaped(text: str) -> str:
  return re.sub(r"[^A-Za-z0-9 \"',:_<>=!@%;/`\x7f-\U0010ffff]", r"\\\g<0>", text)


class Pattern:
  """A schema's `pattern`, whose syntax is JavaScript's, within a JSON string in Rust's.

  A pattern is found anywhere in a string unless `^` and `$` tie it to the ends. Only
  characters that stand for themselves in JSON, quotes and backslashes can match.
  """

  BLANKS = r" \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
  CLASSES: ClassVar = {"d": "0-9", "w": "A-Za-z0-9_", "s": BLANKS}
  ANY = rf"[{PLAIN}&&[^\u2028\u2029]]"
  CONTROLS = "nrtf"  # written in a pattern as in a JSON string

  def __init__(self, pattern: str):
    self.pattern, self.at, self.depth = pattern, 0, 0

  def expression(self) -> str:
    branches = [self._branch()]
    while self.at < len(self.pattern):
      self._expect("|")
      branches.append(self._branch())
    return any_of(branches)

  def _branch(self) -> str:
    """Up to a `|` outside of groups, with what may come before and after."""
    before, after, parts = f"{CHARACTER}*", f"{CHARACTER}*", []
    if self._takes("^"):
      before = ""
    while self.at < len(self.pattern) and self.pattern[self.at] != "|":
      if self.pattern[self.at] == "$" and self.pattern[self.at + 1 : self.at + 2] in (
        "",
        "|",
      ):
        self.at += 1
        after = ""
        break
      parts.append(self._piece())
    return before + f"(?:{''.join(parts)})" + after

  def _piece(self) -> str:
    """One character, class or group, and how often it comes."""
    letter = self._next()
    if letter == "(":
      atom = self._group()
    elif letter == "[":
      atom = self._class()
    elif letter == "\\":
      atom = self._escape()
    elif letter == ".":
      atom = self.ANY
    elif letter in "^$|)*+?{}]":
      self._no(f"{letter!r}")
    else:
      atom = self._one(letter)
    return f"(?:{atom}){self._repeats()}"

  def _group(self) -> str:
    if self._takes("?") and not self._takes(":"):
      self._no(f"(?{self.pattern[self.at : self.at + 1]}")
    self.depth += 1
    if self.depth > MOST_GROUPS:
      self._no(f"more than {MOST_GROUPS} groups within each other")
    branches: list[str] = []
    parts: list[str] = []
    while not self._takes(")"):
      if self._takes("|"):
        branches.append("".join(parts))
        parts = []
      else:
        parts.append(self._piece())
    self.depth -= 1
    return any_of([*branches, "".join(parts)])

  def _class(self) -> str:
    negated, items = self._takes("^"), []
    while not self._takes("]"):
      first = self._member()
      between, after = self.pattern[self.at : self.at + 1], self.pattern[self.at + 1 :]
      if len(first) > 1:
        items.append(first)
      elif between != "-" or after[:1] in ("]", ""):
        items.append(_code(first))
      else:
        self.at += 1
        last = self._member()
        if len(last) != 1 or last < first:
          self._no(f"the range {first}-{last}")
        items.append(f"{_code(first)}-{_code(last)}")
    if not items:
      self._no("an empty class")
    inside = f"[{'^' if negated else ''}{''.join(items)}]"
    # What must be escaped in JSON can be no member of a class.
    return f"[{inside}&&{PLAIN}]"

  def _member(self) -> str:
    """A character of a class, or the ranges that a `\\d` stands for."""
    letter = self._next()
    if letter != "\\":
      return letter
    letter = self._next()
    if letter in self.CLASSES:
      return self.CLASSES[letter]
    if letter.isalnum():
      self._no(f"\\{letter} in a class")
    return letter

  def _escape(self) -> str:
    letter = self._next()
    if letter in self.CLASSES:
      return f"[{self.CLASSES[letter]}]"
    if letter.lower() in self.CLASSES:
      return f"[[^{self.CLASSES[letter.lower()]}]&&{PLAIN}]"
    if letter in self.CONTROLS:
      return rf"\\{letter}"
    if letter.isalnum():
      self._no(f"\\{letter}")
    return self._one(letter)

  def _one(self, letter: str) -> str:
    """A character as it is written in a JSON string."""
    return escaped(text_of(letter)[1:-1])

  def _repeats(self) -> str:
    found = re.compile(r"([*+?]|\{(\d{1,9})(,(\d{1,9})?)?\})?\??").match(
      self.pattern, self.at
    )
    assert found is not None
    self.at = found.end()
    for number in (found[2], found[4]):
      if number is not None and int(number) > MOST_REPEATS:
        self._no(f"{found[1]}", f"a count can be 0 to {MOST_REPEATS}")
    if found[4] is not None and int(found[4]) < int(found[2]):
      self._no(f"{found[1]}")
    return found[1] or ""  # a lazy repeat, as `+?`, matches the same texts

  def _next(self) -> str:
    if self.at == len(self.pattern):
      self._no("its end")
    self.at += 1
    return self.pattern[self.at - 1]

  def _takes(self, letter: str) -> bool:
    is_next = self.pattern[self.at : self.at + 1] == letter
    self.at += is_next
    return is_next

  def _expect(self, letter: str) -> None:
    if not self._takes(letter):
      self._no(repr(self.pattern[self.at]))

  def _no(self, what: str, cure: str = "") -> NoReturn:
    raise ConfigError(f"{what} is not supported in {reprlib.repr(self.pattern)}", cure)


def _code(letter: str) -> str:
  """A character of a class, by its number: none of them means anything else in Rust's."""
  return f"\\x{{{ord(letter):x}}}"
