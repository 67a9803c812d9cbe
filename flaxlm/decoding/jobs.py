# SPDX-License-Identifier: Apache-2.0
"""Many prompts from a JSON-lines file: answered together, and resumable.

Finished prompts are appended to OUTPUT.partial; a run that was killed reads them, and
continues with the rest. The output appears when it is complete, in the input's order.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import itertools
import json
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from flaxlm.config import unique_keys
from flaxlm.decoding.completions import (
  Completion,
  GrowingCompletion,
  Stopping,
  answer_all,
  as_texts,
  complete,
  make_request,
)
from flaxlm.decoding.constraint import check_expressions
from flaxlm.decoding.engine import Engine
from flaxlm.decoding.loading import Run
from flaxlm.decoding.prefill import BLOCK_STEPS, MOST_NEW_TOKENS
from flaxlm.decoding.requests import EngineOptions, EngineRequest
from flaxlm.decoding.row_settings import rules_of
from flaxlm.decoding.sampling import (
  MOST_SAMPLES,
  SamplingSettings,
  check_rows,
  is_number,
  stack_settings,
)
from flaxlm.decoding.schemas import regex_of_form
from flaxlm.errors import ConfigError, first_line, writing
from flaxlm.strict_json import to_json


class PromptJob(NamedTuple):
  """One line of the input: a prompt, and how it is to be completed."""

  prompt: str
  settings: SamplingSettings
  stop: Stopping
  max_new_tokens: int | None
  num_samples: int = 1
  id: str | float | None = None  # the user's own, which the answers repeat
  line: int | None = None  # where it stands


class SizedJob(NamedTuple):
  """A job, and the lengths that decide when it begins."""

  number: int  # of the job in the input, from 0
  job: PromptJob
  length: int  # tokens of the prompt
  num_new: int


SETTING_KEYS = {field.name for field in dataclasses.fields(SamplingSettings)}
SETTING_KEYS -= {"row", "sample"}  # these follow from the line
JOB_KEYS = {*SETTING_KEYS, "prompt", "stop", "stop_tokens", "max_seconds", "max_new_tokens"}
JOB_KEYS |= {"json_schema", "num_samples", "id"}
PREFIX_BYTES = 2**28  # of what prompts have in common
RESUMES = "free some space; the same command goes on from what is done"


def read_jobs(text: str, defaults: PromptJob) -> list[PromptJob]:
  """The jobs of a JSON-lines text. Job i is row i of the default seed, or, with a seed of
  its own, the first row of that one: it draws what it would alone.

  Raises `ConfigError`, with the line's number, for a line that is not a job.
  """
  jobs: list[PromptJob] = []
  # Only \n ends a line: within a JSON string, U+2028 and its like stand for themselves.
  for number, line in enumerate(text.removeprefix("\N{BYTE ORDER MARK}").split("\n"), 1):
    if not line.strip():
      continue
    try:
      job = read_job(read_object(line), defaults, len(jobs))
      jobs.append(job._replace(line=number))
    except ConfigError as e:
      raise ConfigError(
        f"line {number} of the prompts: {e.cause}",
        e.cure or 'as in {"prompt": "def ", "top_p": 0.9}',
      ) from e
  if expressions := [job.settings.regex for job in jobs if job.settings.regex is not None]:
    check_expressions(expressions)
  return jobs


def read_object(text: str) -> dict[str, Any]:
  """The JSON object that a text is. Raises `ConfigError`."""

  def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")

  try:
    values = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse)
  except RecursionError as e:
    raise ConfigError("the JSON is nested too deeply") from e
  except ValueError as e:
    raise ConfigError(str(e)) from e
  if not isinstance(values, dict):
    raise ConfigError(f"{reprlib.repr(values)} is not a JSON object")
  return values


def read_job(values: dict[str, Any], defaults: PromptJob, number: int) -> PromptJob:
  """The job of a JSON object; a field that is null is left out.

  Raises `ConfigError` for a field that is wrong.
  """
  values = {name: value for name, value in values.items() if value is not None}
  if unknown := sorted(set(values) - JOB_KEYS):
    near = difflib.get_close_matches(unknown[0], JOB_KEYS, 1)
    raise ConfigError(
      f"{reprlib.repr(unknown[0])} is not one of {', '.join(sorted(JOB_KEYS))}",
      f"did you mean {near[0]}?" if near else "",
    )
  if not isinstance(values.get("prompt"), str):
    raise ConfigError("there is no prompt, or it is not a string")
  as_texts(values["prompt"])
  stop = Stopping(
    strings=list_of(values, "stop", defaults.stop.strings),
    tokens=list_of(values, "stop_tokens", defaults.stop.tokens),
    max_seconds=values.get("max_seconds", defaults.stop.max_seconds),
  )
  stop.check()
  own_id = read_id(values)
  num_new = values.get("max_new_tokens", defaults.max_new_tokens)
  if num_new is not None:
    check_count("max_new_tokens", num_new, MOST_NEW_TOKENS)
  num_samples = values.get("num_samples", defaults.num_samples)
  check_count("num_samples", num_samples, MOST_SAMPLES)
  settings = read_settings(values, defaults.settings, number)
  return PromptJob(values["prompt"], settings, stop, num_new, num_samples, own_id)


def read_settings(
  values: dict[str, Any], defaults: SamplingSettings, number: int
) -> SamplingSettings:
  """The sampling settings of job `number`. Raises `ConfigError` for one that is wrong."""
  own = {name: value for name, value in values.items() if name in SETTING_KEYS}
  if "logit_bias" in own:
    own["logit_bias"] = _read_biases(own["logit_bias"])
  if "banned_tokens" in own:
    own["banned_tokens"] = list_of(own, "banned_tokens", ())
  if "json_schema" in values:
    own["regex"] = regex_of_form(own.get("regex"), values["json_schema"])
  if "seed" not in own:
    own["row"] = number
  settings = dataclasses.replace(defaults, **own)
  settings.check()
  return settings


def read_id(values: dict[str, Any]) -> str | float | None:
  """The user's own name for a line; None if there is none. Raises `ConfigError`."""
  own_id = values.get("id")
  if "id" in values and not (isinstance(own_id, str) or is_number(own_id)):
    raise ConfigError(f"id is {reprlib.repr(own_id)}", "use a string or a number")
  return own_id


def list_of(values: dict[str, Any], name: str, default: Sequence) -> Sequence:
  """A field that is a list or, for `stop`, may be a string alone."""
  found = values.get(name, default)
  if name in values and not isinstance(found, (list, str) if name == "stop" else list):
    raise ConfigError(f"{name} is {reprlib.repr(found)}, not a list")
  return found


def _read_biases(values: Any) -> dict[int, Any]:
  """{token: bias} of a JSON object, whose names are strings."""
  if not isinstance(values, dict):
    raise ConfigError(f"logit_bias is {reprlib.repr(values)}", 'as in {"50256": -5}')
  for name in values:
    if not is_id(name):
      raise ConfigError(f"logit_bias has {reprlib.repr(name)}", 'as in {"50256": -5}')
  return {int(name): bias for name, bias in values.items()}


def is_id(name: str) -> bool:
  """Whether a name of a JSON object is a token id. It has one way to be written: of two,
  one would be lost."""
  return name.isascii() and name.isdecimal() and name == str(int(name[:10]))


def check_count(name: str, count: Any, most: int) -> None:
  """Raises `ConfigError` for a field that is not a whole number of 1 to `most`."""
  if not is_number(count, whole=True) or not 1 <= count <= most:
    raise ConfigError(f"{name} is {reprlib.repr(count)}", f"it can be 1 to {most}")


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
  or another process writes it, or OUTPUT is no file. Raises `WriteError` if the disk is
  full: OUTPUT.partial stays.
  """
  if output.exists() and not output.is_file():  # it would be replaced, even a device
    raise ConfigError(f"--output {output} is not a file", "name one, or a new one")
  partial = output.with_name(output.name + ".partial")
  header = {"job": fingerprint(run, jobs, num_top)}
  sized = [measure_job(run, number, job) for number, job in enumerate(jobs)]
  with opened_alone(partial) as file:
    done = read_partial(partial, header)
    on_done(len(done))
    if not done:
      file.truncate(0)
      print(to_json(header), file=file, flush=True)
    rest = [job for job in sized if job.number not in done]
    for number, samples in answer_jobs(run, rest, batch_size, num_top):
      done[number] = samples
      print(to_json({"index": number, "samples": samples}), file=file, flush=True)
      on_done(1)
    whole = output.with_name(output.name + ".tmp")
    try:
      with writing(whole, RESUMES), whole.open("w", encoding="utf-8") as answers:
        for number in range(len(jobs)):
          for sample in done[number]:
            print(to_json(sample), file=answers)
      whole.replace(output)
    finally:
      whole.unlink(missing_ok=True)
    partial.unlink()


@contextlib.contextmanager
def opened_alone(partial: Path) -> Iterator[TextIO]:
  """The file to append to. Raises `ConfigError` while another process has it open."""
  with writing(partial, RESUMES), partial.open("a", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(
        f"another process writes {partial}", "wait for it, or choose another --output"
      ) from None
    yield file


def answer_jobs(
  run: Run, jobs: Sequence[SizedJob], batch_size: int, num_top: int
) -> Iterator[tuple[int, list[dict]]]:
  """The number of each job, and its samples, when they are all done.

  The longest begin first: jobs of like length are decoded together, and at the end no long
  one is alone.
  """
  by_length = sorted(jobs, key=lambda x: (-x.length - x.num_new, x.number))
  if run.draft is not None:
    yield from answer_guessing(run, by_length, batch_size, num_top)
    return
  options = EngineOptions(rows=batch_size, most_read=None, prefix_bytes=PREFIX_BYTES)
  engine = Engine(run.model, run.params, run.num_ids, run.mesh, run.tokenizer, options)
  asked: dict[int, tuple[SizedJob, int, Completion]] = {}
  places = itertools.count()
  left = {sized.number: sized.job.num_samples for sized in jobs}
  samples: dict[int, list[Any]] = {n: [None] * count for n, count in left.items()}

  def answers() -> Iterator[tuple[EngineRequest, GrowingCompletion]]:
    for sized in by_length:
      job = sized.job
      request = make_request(run, [job.prompt], sized.num_new, num_top)
      for settings in job.settings.for_samples(job.num_samples):
        answer = GrowingCompletion(Completion(job.prompt), run.tokenizer, job.stop)
        asked[next(places)] = sized, settings.sample, answer.result
        yield answer.request(request, settings), answer

  for place, _ in answer_all(engine, answers()):
    if asked[place][2].finish_reason is None:
      continue
    sized, sample, result = asked.pop(place)
    samples[sized.number][sample] = named(sized, result)
    left[sized.number] -= 1
    if not left[sized.number]:
      yield sized.number, samples.pop(sized.number)


def answer_guessing(
  run: Run, jobs: Sequence[SizedJob], batch_size: int, num_top: int
) -> Iterator[tuple[int, list[dict]]]:
  """`answer_jobs` with a draft, whose batches begin and end together."""
  assert run.draft is not None
  models = [one for one in (run.model, run.draft.model) if one is not None]
  context = min(model.cfg.context for model in models)
  for batch in batch_jobs(jobs, batch_size, context):
    rows = [sized for sized in batch for _ in range(sized.job.num_samples)]
    settings = [
      of_sample
      for sized in batch
      for of_sample in sized.job.settings.for_samples(sized.job.num_samples)
    ]
    completions = complete(
      run,
      [row.job.prompt for row in rows],
      settings,
      max(row.num_new for row in rows),
      [dataclasses.replace(row.job.stop, max_tokens=row.num_new) for row in rows],
      num_top=num_top,
    )
    results: dict[int, list[dict]] = {sized.number: [] for sized in batch}
    for row, completion in zip(rows, completions, strict=True):
      results[row.number].append(named(row, completion))
    yield from results.items()


def named(sized: SizedJob, completion: Completion) -> dict:
  """A sample as it is written, with the job's own id."""
  own_id = {} if sized.job.id is None else {"id": sized.job.id}
  return own_id | completion.as_json()


def measure_job(run: Run, number: int, job: PromptJob) -> SizedJob:
  """Raises `ConfigError`, with the job's line or number, if it does not fit the model."""
  try:
    request = make_request(run, [job.prompt], job.max_new_tokens)
    request.check(run.model.cfg)
    unformed = dataclasses.replace(
      job.settings, regex=None
    )  # whose ids are the tokenizer's
    check_rows(stack_settings([unformed]), 1, run.num_ids)
    job.stop.check(run.num_ids)
    if run.draft is not None:
      run.draft.check(run.model, rules_of([job.settings]))
      if run.draft.model is not None:
        request.check(run.draft.model.cfg)
  except ConfigError as e:
    where = (
      f"prompt {number + 1}" if job.line is None else f"line {job.line} of the prompts"
    )
    raise ConfigError(f"{where}: {e.cause}", e.cure) from e
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


def fingerprint(run: Run, jobs: Sequence[PromptJob], num_top: int) -> str:
  everything = repr((str(run.path), run.step, num_top, [*jobs]))
  return hashlib.sha256(everything.encode()).hexdigest()


def read_partial(path: Path, header: dict[str, str]) -> dict[int, list[dict]]:
  """The samples that an earlier run has written, by the number of their job.

  A last line that was cut short is removed.
  """
  try:
    *lines, cut_short = path.read_text("utf-8").split("\n")
    whole = [read_object(line) for line in lines]
    done = {record["index"]: record["samples"] for record in whole[1:]}
  except FileNotFoundError:
    return {}
  except (OSError, UnicodeDecodeError, ConfigError, KeyError) as e:
    raise ConfigError(f"{path} cannot be read: {first_line(e)}", "remove it") from e
  if whole and whole[0] != header:
    raise ConfigError(
      f"{path} belongs to other prompts or settings",
      "remove it, or choose another --output",
    )
  if cut_short:  # in place, which a full disk allows
    os.truncate(path, len("".join(line + "\n" for line in lines).encode()))
  return done
