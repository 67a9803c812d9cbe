# SPDX-License-Identifier: Apache-2.0
"""The end of a run: a sample of what the model writes, and commands to try next."""

import shlex
from collections.abc import Sequence

from flaxlm.chat.templates import load_chat
from flaxlm.config import TALKS, without
from flaxlm.decoding.chat import Conversation
from flaxlm.decoding.completions import (
  DEFAULT_NEW_TOKENS,
  Request,
  complete,
  complete_request,
  make_request,
  search,
)
from flaxlm.decoding.encoding import fill_masks
from flaxlm.decoding.loading import Run
from flaxlm.decoding.sampling import GREEDY, SamplingSettings
from flaxlm.errors import ConfigError, writing
from flaxlm.runs import SAMPLE
from flaxlm.tokenizers import MASK
from flaxlm.training.reporting import Reporter


def show_sample(
  run: Run,
  reporter: Reporter,
  arguments: Sequence[str] = (),
  asked: Sequence[int] | None = None,
) -> None:
  """Prints what the model makes of `sample_prompt`, and what to try next.

  Without one, what is `asked`, the ids of a prompt in a chat template, is answered.

  Every process of a job computes the sample, for the model may be spread over all of them.
  `arguments` are those of the command that trained the run, which has ended well, whatever
  becomes of the sample: a prompt may be too long for the model.
  """
  reporter.end_progress()
  try:
    text, tries = sample(run, asked)
  except ConfigError as e:
    reporter.log(f"no sample of training.sample_prompt: {e.cause}")
    tries = []
  else:
    reporter.log("a sample:")
    if reporter.writes:
      print(text, flush=True)
      with writing(run.path / SAMPLE):
        (run.path / SAMPLE).write_text(f"{text}\n", "utf-8")
      if run.cfg.training.sample_every_steps is not None:
        reporter.sample(run.step, text)
  commands = [*map(shlex.join, tries)]
  commands.append(longer(arguments, f"{run.cfg.name}_longer", 2 * run.step))
  show = shlex.join(["tensorboard", "--logdir", run.cfg.runs_dir])
  commands.append(f"{show}   (pip install tensorboard)")
  reporter.log("next, try:\n" + "\n".join(f"  {line}" for line in commands))


def sample(run: Run, asked: Sequence[int] | None = None) -> tuple[str, list[list[str]]]:
  """What the model makes of `sample_prompt`, and the words of commands that show more.

  Raises `ConfigError` for a prompt that the model cannot read.
  """
  family, prompt = run.cfg.model.family, run.cfg.training.sample_prompt
  path = str(run.path)
  infer = ["python", "infer.py", path]
  if family == "encoder":
    prompt = prompt if MASK in prompt else f"import {MASK}"
    (filled,) = fill_masks(run, [prompt])
    embed = ["flaxlm", "embed", path, "--text", "a sentence"]
    return filled.filled, [[*infer, "--fill", prompt], embed]
  if family == "encoder_decoder":
    prompt = prompt or "Search"
    (found,) = search(run, [prompt], num_beams=4)
    more = [
      [*infer, "--prompt", prompt, "--beams", "4"],
      ["flaxlm", "eval", path, "--bleu"],
    ]
    return f"{prompt} => {found.completion}", more
  is_chat = run.cfg.data.objective in (*TALKS, "reward")
  if is_chat and load_chat(run.path) is not None:
    if not prompt and asked:
      return continued(run, asked), [[*infer, "--interactive"]]
    prompt = prompt or "Hello."
    return f"{prompt} => {answer(run, prompt)}", [[*infer, "--interactive"]]
  settings = SamplingSettings(temperature=0.8, top_p=0.95, seed=run.cfg.seed)
  (drawn,) = complete(run, [prompt], [settings])
  return drawn.prompt + drawn.completion, [[*infer, "--prompt", prompt or "Once"]]


def answer(run: Run, question: str) -> str:
  """What the model answers in its chat template. Raises `ConfigError`."""
  chat = load_chat(run.path)
  assert chat is not None, "it is stored with the run"
  prompt = Conversation(chat, run).ask(question).text
  request = make_request(run, [prompt], None, has_specials=True)
  (found,) = complete_request(run, request, [prompt], [GREEDY])
  return found.completion


def continued(run: Run, prompt: Sequence[int]) -> str:
  """A prompt of a chat template, and the answer to it. Raises `ConfigError`."""
  shown = run.tokenizer.decode(prompt).strip()
  room = max(1, min(DEFAULT_NEW_TOKENS, run.model.cfg.context - len(prompt)))
  request = Request([[*prompt]], room, run.num_ids)
  (found,) = complete_request(run, request, [shown], [GREEDY])
  return f"{shown} => {found.completion}"


def longer(arguments: Sequence[str], name: str, num_steps: int) -> str:
  """The command that trains the same config for more steps, into a run of its own."""
  same = without(arguments, ("name", "training.num_steps"))
  command = ["python", "train.py", *same, f"--name={name}"]
  return shlex.join([*command, f"--training.num-steps={num_steps}"])
