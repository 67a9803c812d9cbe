# SPDX-License-Identifier: Apache-2.0
"""How large the automata of regular expressions are, found out within limits.

A program of its own, which `constraint.check_expressions` starts: a short expression can
have an automaton of any size (`(a|b)*a(a|b){30}` has two billion states), and the library
that builds it has no limits. This process has. It reads {"seconds", "bytes", "expressions"}
as JSON from stdin, and writes a line of JSON for each expression: its {"states", "links"},
the transitions by bytes, or its {"error"}. It ends without a word at the first one that
takes more processor time or memory.
"""

import json
import math
import resource
import sys

import outlines_core

END = "\U0010ffff".encode()  # as in `constraint`


def main() -> None:
  given = json.load(sys.stdin)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_AS, (given["bytes"], given["bytes"]))
  pieces = {bytes([byte]): [byte] for byte in range(256)} | {END: [256]}
  vocabulary = outlines_core.Vocabulary(257, pieces)
  for expression in given["expressions"]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime) + given["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    try:
      links = outlines_core.Index(expression, vocabulary).get_transitions()
      found: dict[str, int | str] = {
        "states": len(links),
        "links": sum(map(len, links.values())),
      }
    except ValueError as e:
      found = {"error": str(e)}
    print(json.dumps(found, allow_nan=False), flush=True)


if __name__ == "__main__":
  main()
