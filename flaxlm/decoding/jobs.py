# SPDX-License-Identifier: Apache-2.0
"""Many prompts from a JSON-lines file: batched by length, and resumable.

Finished prompts are appended to OUTPUT.partial; a run that was killed reads them, and
continues with the rest. The output appears when it is complete, in the input's order.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxlm.decoding.completions import Stopping, complete, make_request
from flaxlm.decoding.constraint import regex_of_schema
from flaxlm.decoding.generate import PrefixCache
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import BLOCK_STEPS, SMALLEST_PREFIX, common_length
from flaxlm.decoding.sampling import SamplingSettings, stack_settings
from flaxlm.errors import ConfigError, first_line, writing
from flaxlm.strict_json import to_json


class PromptJob(NamedTuple):
  """One line of the input: a prompt, and how it is to be completed."""

  prompt: str
  settings: SamplingSettings
  stop: Stopping
  max_new_tokens: int | None
  num_samples: int = 1


class SizedJob(NamedTuple):
  """A job, and the lengths that decide which batch it joins."""

  number: int  # of the job in the input, from 0
  job: PromptJob
  length: int  # tokens of the prompt
  num_new: int


SETTING_KEYS = {field.name for field in dataclasses.fields(SamplingSettings)}
JOB_KEYS = {*SETTING_KEYS, "prompt", "stop", "stop_tokens", "max_seconds", "max_new_tokens"}
RESUMES = "free some space; the same command goes on from what is done"
JOB_KEYS |= {"json_schema", "num_samples", "id"}  # an id is for the user alone


def read_jobs(text: str, defaults: PromptJob) -> list[PromptJob]:
  """The jobs of a JSON-lines text; job i draws with the default seed + i.

  Raises `ConfigError`, with the line's number, for a line that is not a job.
  """
  jobs: list[PromptJob] = []
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


def read_job(values: dict[str, Any], defaults: PromptJob, number: int) -> PromptJob:
  if unknown := sorted(set(values) - JOB_KEYS):
    raise ConfigError(f"{unknown[0]!r} is not one of {', '.join(sorted(JOB_KEYS))}")
  if not isinstance(values.get("prompt"), str):
    raise ConfigError("there is no prompt, or it is not a string")
  own = {name: value for name, value in values.items() if name in SETTING_KEYS}
  if "logit_bias" in own:
    own["logit_bias"] = {int(token): bias for token, bias in own["logit_bias"].items()}
  if "json_schema" in values:
    own["regex"] = regex_of_schema(values["json_schema"])
  own.setdefault("seed", (defaults.settings.seed + number) % 2**31)
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
      raise ConfigError(f"{name} is {count!r}")
  return PromptJob(values["prompt"], settings, stop, num_new, num_samples)


def complete_jobs(
  run: Run,
  jobs: Sequence[PromptJob],
  output: Path,
  batch_size: int,
  num_top: int = 0,
  on_done: Callable[[int], None] = lambda _: None,
) -> None:
  """Writes one JSON object per sample, in the order of the jobs.

  `on_done(n)` is called whenever n more jobs are done; first with those that an earlier,
  killed run has done. Raises `ConfigError` if OUTPUT.partial is of other jobs or settings,
  or OUTPUT is no file. Raises `WriteError` if the disk is full: OUTPUT.partial stays.
  """
  if output.exists() and not output.is_file():  # it would be replaced, even a device
    raise ConfigError(f"--output {output} is not a file", "name one, or a new one")
  partial = output.with_name(output.name + ".partial")
  header = {"job": fingerprint(run, jobs, num_top)}
  done = read_partial(partial, header)
  on_done(len(done))
  sized = [
    measure_job(run, number, job) for number, job in enumerate(jobs) if number not in done
  ]
  prefix_cache = PrefixCache() if share_a_prefix(run, jobs) else None
  with writing(partial, RESUMES), partial.open("a", encoding="utf-8") as file:
    if not done:
      file.truncate(0)
      print(to_json(header), file=file, flush=True)
    for batch in batch_jobs(sized, batch_size, run.model.cfg.context):
      results = complete_batch(run, batch, num_top, prefix_cache)
      for number, samples in results.items():
        done[number] = samples
        print(to_json({"index": number, "samples": samples}), file=file, flush=True)
      on_done(len(results))
  whole = output.with_name(output.name + ".tmp")
  try:
    with writing(whole, RESUMES), whole.open("w", encoding="utf-8") as file:
      for number in range(len(jobs)):
        for sample in done[number]:
          print(to_json(sample), file=file)
    whole.replace(output)
  finally:
    whole.unlink(missing_ok=True)
  partial.unlink()


def complete_batch(
  run: Run,
  batch: Sequence[SizedJob],
  num_top: int,
  prefix_cache: PrefixCache | None,
) -> dict[int, list[dict]]:
  """The samples of each job, by its number: sample n of a job draws with its seed + n."""
  rows: list[SizedJob] = []
  settings: list[SamplingSettings] = []
  for sized in batch:
    rows += [sized] * sized.job.num_samples
    settings += sized.job.settings.for_samples(sized.job.num_samples)
  completions = complete(
    run,
    [row.job.prompt for row in rows],
    stack_settings(settings, run.tokenizer),
    max(row.num_new for row in rows),
    [dataclasses.replace(row.job.stop, max_tokens=row.num_new) for row in rows],
    num_top=num_top,
    prefix_cache=prefix_cache,
  )
  results: dict[int, list[dict]] = {sized.number: [] for sized in batch}
  for row, completion in zip(rows, completions, strict=True):
    results[row.number].append(completion.as_json())
  return results


def measure_job(run: Run, number: int, job: PromptJob) -> SizedJob:
  """Raises `ConfigError`, with the job's number, if it does not fit the model."""
  request = make_request(run, [job.prompt], job.max_new_tokens)
  try:
    request.check(run.model.cfg)
  except ConfigError as e:
    raise ConfigError(f"prompt {number + 1}: {e.cause}", e.cure) from e
  return SizedJob(number, job, len(request.prompts[0]), request.max_new_tokens)


def batch_jobs(
  sized: Sequence[SizedJob], batch_size: int, context: int
) -> Iterator[list[SizedJob]]:
  """Batches of jobs of similar length, which fit the context together.

  A batch has at most `batch_size` samples; a job with more is a batch of its own.
  """
  by_length = lambda x: (-(-x.num_new // BLOCK_STEPS), x.length, x.number)
  batch: list[SizedJob] = []
  for job in sorted(sized, key=by_length):
    longer = [*batch, job]
    fits = max(x.length for x in longer) + max(x.num_new for x in longer) <= context
    if batch and (sum(x.job.num_samples for x in longer) > batch_size or not fits):
      yield batch
      longer = [job]
    batch = longer
  if batch:
    yield batch


def share_a_prefix(run: Run, jobs: Sequence[PromptJob]) -> bool:
  """Whether all prompts begin with the same `SMALLEST_PREFIX` tokens."""
  first = min((job.prompt for job in jobs), default="")
  last = max((job.prompt for job in jobs), default="")
  encode = run.tokenizer.encode
  return common_length(encode(first), encode(last), SMALLEST_PREFIX) == SMALLEST_PREFIX


def fingerprint(run: Run, jobs: Sequence[PromptJob], num_top: int) -> str:
  everything = repr((str(run.path), run.step, num_top, [*jobs]))
  return hashlib.sha256(everything.encode()).hexdigest()


def read_partial(path: Path, header: dict[str, str]) -> dict[int, list[dict]]:
  """The samples that an earlier run has written, by the number of their job.

  A last line that was cut short is removed.
  """
  try:
    lines = path.read_text("utf-8").splitlines(keepends=True)
  except FileNotFoundError:
    return {}
  except (OSError, UnicodeDecodeError) as e:
    raise ConfigError(f"{path} cannot be read: {first_line(e)}") from e
  whole = [json.loads(line) for line in lines if line.endswith("\n")]
  if whole and whole[0] != header:
    raise ConfigError(
      f"{path} belongs to other prompts or settings",
      "remove it, or choose another --output",
    )
  if lines and not lines[-1].endswith("\n"):  # cut in place, which a full disk allows
    os.truncate(path, len("".join(lines[:-1]).encode()))
  return {record["index"]: record["samples"] for record in whole[1:]}
