# SPDX-License-Identifier: Apache-2.0
"""Many prompts from a JSON-lines file: batched by length, in order, resumable.

Finished rows are appended to OUTPUT.partial as they come; a job that was killed reads
them and goes on with the rest. The output itself appears whole, in the input's order.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxlm.decoding.completions import Stopping, complete, make_request
from flaxlm.decoding.constraint import regex_of_schema
from flaxlm.decoding.generate import Memory
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import BLOCK_STEPS, SMALLEST_PREFIX, common_length
from flaxlm.decoding.sampling import Settings, stack_settings
from flaxlm.errors import ConfigError


class Job(NamedTuple):
  """One line of the input: a prompt, and what differs from the defaults."""

  prompt: str
  settings: Settings
  stop: Stopping
  max_new_tokens: int | None
  num_samples: int = 1


class Sized(NamedTuple):
  """A job and what decides its batch."""

  place: int  # among all jobs
  job: Job
  length: int  # of the prompt, in tokens
  num_new: int


SETTINGS = {field.name for field in dataclasses.fields(Settings)}
KEYS = {*SETTINGS, "prompt", "stop", "stop_tokens", "max_seconds", "max_new_tokens"}
KEYS |= {"json_schema", "num_samples", "id"}  # the id is the user's own


def read_jobs(text: str, defaults: Job) -> list[Job]:
  """The jobs of a JSON-lines text; row i draws with the default's seed + i.

  Raises `ConfigError`, which names the line, for what is no job.
  """
  jobs: list[Job] = []
  for number, line in enumerate(text.splitlines(), 1):
    if not line.strip():
      continue
    try:
      values = json.loads(line)
      jobs.append(read_job(values, defaults, len(jobs)))
    except (ConfigError, ValueError, TypeError, AttributeError) as e:
      cause = e.cause if isinstance(e, ConfigError) else str(e)
      raise ConfigError(
        f"line {number} of the prompts: {cause}", 'as in {"prompt": "def ", "top_p": 0.9}'
      ) from e
  return jobs


def read_job(values: dict[str, Any], defaults: Job, index: int) -> Job:
  if unknown := sorted(set(values) - KEYS):
    raise ConfigError(f"{unknown[0]!r} is not one of {', '.join(sorted(KEYS))}", "")
  if not isinstance(values.get("prompt"), str):
    raise ConfigError("there is no prompt, or it is not a text", "")
  own = {name: value for name, value in values.items() if name in SETTINGS}
  if "logit_bias" in own:
    own["logit_bias"] = {int(token): bias for token, bias in own["logit_bias"].items()}
  if "json_schema" in values:
    own["regex"] = regex_of_schema(values["json_schema"])
  own.setdefault("seed", (defaults.settings.seed + index) % 2**31)
  settings = dataclasses.replace(defaults.settings, **own)
  settings.check()
  strings = values.get("stop", defaults.stop.strings)
  stop = Stopping(
    strings=[strings] if isinstance(strings, str) else [*strings],
    tokens=[*values.get("stop_tokens", defaults.stop.tokens)],
    max_seconds=values.get("max_seconds", defaults.stop.max_seconds),
  )
  stop.check()
  num_new = values.get("max_new_tokens", defaults.max_new_tokens)
  num_samples = values.get("num_samples", defaults.num_samples)
  for name, count in (("max_new_tokens", num_new), ("num_samples", num_samples)):
    if count is not None and (type(count) is not int or count < 1):
      raise ConfigError(f"{name} is {count!r}", "")
  return Job(values["prompt"], settings, stop, num_new, num_samples)


def run_jobs(
  run: Run,
  jobs: Sequence[Job],
  output: Path,
  batch_size: int,
  num_top: int = 0,
  on_done: Callable[[int], None] = lambda _: None,
) -> None:
  """Writes one JSON object per sample, in the order of the jobs.

  `on_done(n)` is called whenever n more jobs are done, those of an earlier, killed run
  first. Raises `ConfigError` if what is there belongs to another job.
  """
  partial = output.with_name(output.name + ".partial")
  mark = {"job": fingerprint(run, jobs, num_top)}
  done = read_partial(partial, mark)
  on_done(len(done))
  sized = [size(run, index, job) for index, job in enumerate(jobs) if index not in done]
  memory = Memory() if shares_a_prefix(run, jobs) else None
  with partial.open("a", encoding="utf-8") as file:
    if not done:
      file.truncate(0)
      print(json.dumps(mark), file=file, flush=True)
    for batch in batches(sized, batch_size, run.model.cfg.context):
      results = run_batch(run, batch, num_top, memory)
      for index, samples in results.items():
        done[index] = samples
        print(json.dumps({"index": index, "samples": samples}), file=file, flush=True)
      on_done(len(results))
  whole = output.with_name(output.name + ".tmp")
  with whole.open("w", encoding="utf-8") as file:
    for index in range(len(jobs)):
      for sample in done[index]:
        print(json.dumps(sample), file=file)
  whole.replace(output)
  partial.unlink()


def run_batch(
  run: Run, batch: Sequence[Sized], num_top: int, memory: Memory | None
) -> dict[int, list[dict]]:
  """The samples of each job, by its index: sample n of a job draws with its seed + n."""
  rows = [of for of in batch for _ in range(of.job.num_samples)]
  settings = [row for of in batch for row in of.job.settings.samples(of.job.num_samples)]
  found = complete(
    run,
    [of.job.prompt for of in rows],
    stack_settings(settings, run.tokenizer),
    max(of.num_new for of in batch),
    [dataclasses.replace(of.job.stop, max_tokens=of.num_new) for of in rows],
    num_top=num_top,
    memory=memory,
  )
  results: dict[int, list[dict]] = {of.place: [] for of in batch}
  for of, completion in zip(rows, found, strict=True):
    results[of.place].append(completion.as_json())
  return results


def size(run: Run, index: int, job: Job) -> Sized:
  """Raises `ConfigError`, which names the job, if it does not fit the model."""
  request = make_request(run, [job.prompt], job.max_new_tokens)
  try:
    request.check(run.model.cfg)
  except ConfigError as e:
    raise ConfigError(f"prompt {index + 1}: {e.cause}", e.cure) from e
  return Sized(index, job, len(request.prompts[0]), request.max_new_tokens)


def batches(sized: Sequence[Sized], batch_size: int, context: int) -> Iterator[list[Sized]]:
  """Jobs of like length together; none that would not fit the context side by side.

  `batch_size` counts samples; a job with more of them is a batch of its own.
  """
  order = sorted(sized, key=lambda of: (-(-of.num_new // BLOCK_STEPS), of.length, of.place))
  batch: list[Sized] = []
  for of in order:
    both = [*batch, of]
    fits = max(x.length for x in both) + max(x.num_new for x in both) <= context
    if batch and (sum(x.job.num_samples for x in both) > batch_size or not fits):
      yield batch
      both = [of]
    batch = both
  if batch:
    yield batch


def shares_a_prefix(run: Run, jobs: Sequence[Job]) -> bool:
  first = min((job.prompt for job in jobs), default="")
  last = max((job.prompt for job in jobs), default="")
  encode = run.tokenizer.encode
  return common_length(encode(first), encode(last), SMALLEST_PREFIX) == SMALLEST_PREFIX


def fingerprint(run: Run, jobs: Sequence[Job], num_top: int) -> str:
  said = repr((str(run.path), run.step, num_top, [*jobs]))
  return hashlib.sha256(said.encode()).hexdigest()


def read_partial(path: Path, mark: dict[str, str]) -> dict[int, list[dict]]:
  """What an earlier run of the same job has done; a last line cut short does not count."""
  try:
    lines = path.read_text("utf-8").splitlines(keepends=True)
  except FileNotFoundError:
    return {}
  except (OSError, UnicodeDecodeError) as e:
    raise ConfigError(f"{path} cannot be read: {e}") from e
  whole = [json.loads(line) for line in lines if line.endswith("\n")]
  if whole and whole[0] != mark:
    raise ConfigError(f"{path} is of another job", "remove it, or choose another --output")
  if lines and not lines[-1].endswith("\n"):
    path.write_text("".join(lines[:-1]), "utf-8")
  return {record["index"]: record["samples"] for record in whole[1:]}
