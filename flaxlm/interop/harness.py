# SPDX-License-Identifier: Apache-2.0
"""A run as a model of EleutherAI's lm-evaluation-harness, which brings thousands of tasks.

Importing this module registers the model `flaxlm` there. The harness has no way to find
models of others by itself, so its command line starts from here:

    python -m flaxlm.interop.harness --model flaxlm --model_args run=RUN --tasks ...
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flaxlm.chat.templates import Chat, Message, Talk, load_chat
from flaxlm.config import parse_mesh
from flaxlm.data.storage import data_dir
from flaxlm.decoding.completions import Stopping
from flaxlm.decoding.jobs import PromptJob
from flaxlm.decoding.loading import Run, load_run
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.decoding.scoring import read_ids, score_continuations, score_rolling
from flaxlm.decoding.tasks import WRITTEN_AT_A_TIME, fit_job, write_answers
from flaxlm.errors import ConfigError, FlaxLMError
from flaxlm.platform import start_jax
from flaxlm.runs import find_run
from flaxlm.sharding import make_mesh
from flaxlm.tokenizers import ImportedTokenizer

try:
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
  from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
  from tqdm import tqdm  # the harness needs it too
except ImportError as e:
  missing = ConfigError(
    "lm-evaluation-harness is not installed", "pip install 'flaxlm[lm-eval]'"
  )
  if __name__ == "__main__":
    print(f"flaxlm: {missing}", file=sys.stderr)
    sys.exit(missing.exit_code)
  raise missing from e

NEW_TOKENS = 256  # if a task does not say: the harness's own default
# Settings of its tasks that are ours by another name, or are no settings of a row.
SAMPLING_KEYS = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
OTHER_KEYS = {"do_sample", "until", "max_gen_toks"}


@register_model("flaxlm")
class FlaxLM(LM):
  """A run that answers the harness's requests as its own `hf` model answers them for the
  same weights and tokenizer.

  Scores are computed in batches of bounded memory, whatever the batch size is; it says how
  many answers are written together.
  """

  def __init__(
    self,
    run: str | None = None,
    mesh: str = "data=-1",
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
    device: str | None = None,
    **unknown: Any,
  ):
    """`run` is a path; without one it is the newest below `runs/`. The mesh says which
    devices are used, and `device` does not."""
    super().__init__()
    if unknown:
      raise ConfigError(
        f"model_args has {', '.join(unknown)}", "as in run=runs/stdlib_tiny,mesh=data=-1"
      )
    warn = lambda line: print(line, file=sys.stderr)
    for flag in start_jax(None, data_dir() / "xla"):
      warn(flag.line)
    path = find_run(None if run is None else str(run))
    self.run = load_run(path, make_mesh(parse_mesh(mesh)), warn)
    size = str(batch_size)
    self.batch_size = int(size) if size.isdecimal() and int(size) else WRITTEN_AT_A_TIME

  @property
  def tokenizer_name(self) -> str:
    """What tells caches of requests apart."""
    return self.run.tokenizer.fingerprint

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy) of each (context, continuation)."""
    pairs = [request.args for request in requests]
    with tqdm(total=len(pairs), desc="flaxlm: continuations") as bar:
      scored = score_continuations(self.run, pairs, bar.update)
    if num_cut := sum(found.num_cut > 0 for found in scored):
      print(
        f"contexts cut from the left to fit model.context={self.run.model.cfg.context}: "
        f"{num_cut:,} of {len(pairs):,}",
        file=sys.stderr,
      )
    results = [(found.logprob, found.is_greedy) for found in scored]
    for pair, result in zip(pairs, results, strict=True):
      self.cache_hook.add_partial("loglikelihood", pair, result)
    return results

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """The log-likelihood of each text. Where the tokenizer begins a text with a token, that
    token is scored too, after another one: the `hf` model does so."""
    texts = [text for (text,) in (request.args for request in requests)]
    rows = [read_ids(self.run, text) if text else [] for text in texts]
    results = [found.logprob for found in score_rolling(self.run, rows)]
    for text, result in zip(texts, results, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
    return results

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """What the model writes after each context, up to the first of its stops."""
    most = min(NEW_TOKENS, max(1, self.run.model.cfg.context // 2))
    jobs = []
    for number, request in enumerate(requests):
      context, said = request.args
      job = job_of(context, normalize_gen_kwargs(said, most), number)
      jobs.append(fit_job(self.run, job))
    results = []
    with tqdm(total=len(jobs), desc="flaxlm: answers") as bar:
      written = write_answers(self.run, jobs, bar.update, self.batch_size)
    for request, fitted, found in zip(requests, jobs, written, strict=True):
      text = self.run.tokenizer.decode(found.tokens)
      text = postprocess_generated_text(text, [*fitted.job.stop.strings], None)
      results.append(text)
      self.cache_hook.add_partial("generate_until", request.args, text)
    return results

  def apply_chat_template(
    self, chat_history: Sequence[Message], add_generation_prompt: bool = True
  ) -> str:
    """The prompt for a conversation. Raises `ConfigError` for one that ends in the middle
    of an answer."""
    if not add_generation_prompt:
      raise ConfigError(
        "flaxlm does not begin the assistant's answer", "leave gen_prefix out of the task"
      )
    return chat_of(self.run).render(chat_history)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The text of the run's template, by which the harness tells caches apart."""
    chat = chat_of(self.run)
    return chat.templates[chat.choose(Talk([]))] if chat_template else ""


def chat_of(run: Run) -> Chat:
  """The run's chat template. Raises `ConfigError` if it has none that the harness can use:
  it takes prompts as texts, in which a tokenizer of ours reads no special tokens."""
  chat, cure = load_chat(run.path), "leave out --apply_chat_template"
  if chat is None:
    raise ConfigError(f"{run.path} has no chat template", cure)
  if not isinstance(run.tokenizer, ImportedTokenizer):
    raise ConfigError(
      f"{run.path} has a tokenizer that reads no special tokens in a text",
      f"{cure}, or export the run and use --model hf",
    )
  return chat


def job_of(context: str, settings: Mapping[str, Any], number: int) -> PromptJob:
  """A request of the harness as a job; it is row `number` of the draws.

  Raises `ConfigError` for a setting of generation that the decoder lacks.
  """
  if unknown := sorted(set(settings) - SAMPLING_KEYS - OTHER_KEYS):
    raise ConfigError(
      f"generation_kwargs has {unknown[0]!r}", f"it may have {sorted(SAMPLING_KEYS)}"
    )
  own = {name: settings[name] for name in SAMPLING_KEYS if name in settings}
  if not settings["do_sample"]:
    own["temperature"] = 0
  if not own.get("top_k"):  # transformers takes 0 for none
    own["top_k"] = None
  sampling = SamplingSettings(**own, row=number)
  sampling.check()
  stop = Stopping(strings=[text for text in settings["until"] if text])
  return PromptJob(context, sampling, stop, settings["max_gen_toks"])


def main() -> int:
  """The harness's command line, in which `--model flaxlm` is known."""
  from lm_eval.__main__ import cli_evaluate

  try:
    cli_evaluate()
  except FlaxLMError as e:
    print(f"flaxlm: {e}", file=sys.stderr)
    return e.exit_code
  return 0


if __name__ == "__main__":
  sys.exit(main())
