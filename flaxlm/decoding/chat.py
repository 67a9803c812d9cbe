# SPDX-License-Identifier: Apache-2.0
"""Conversations with an imported run, in the chat template of its tokenizer."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flaxlm.errors import ConfigError, DataError
from flaxlm.runs import IMPORTED_FILES

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
Message = dict[str, str]  # "role" (system, user, assistant) and "content"


def load_chat(run_dir: Path) -> Callable[[Sequence[Message]], str] | None:
  """A function that turns messages into a prompt; None if the run has no chat template.

  The prompt does not have the start-of-text token, which the tokenizer adds. Raises
  `ConfigError` without jinja2, `DataError` if the template is damaged; the function
  raises `DataError` if the template fails.
  """
  settings: dict[str, Any] = {}
  folder = run_dir / IMPORTED_FILES
  try:
    if (folder / TOKENIZER_CONFIG).is_file():
      settings = json.loads((folder / TOKENIZER_CONFIG).read_text("utf-8"))
    text = settings.get("chat_template")
    if (folder / TEMPLATE).is_file():
      text = (folder / TEMPLATE).read_text("utf-8")
  except (OSError, ValueError, AttributeError) as e:
    raise DataError(f"the chat template in {folder} cannot be read: {e}") from e
  if not isinstance(text, str):
    return None
  try:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError as e:
    raise ConfigError(
      f"the chat template of {run_dir} needs jinja2", "pip install jinja2, or --no-chat"
    ) from e

  def refuse(message: str) -> None:
    raise TemplateError(message)

  environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.globals["raise_exception"] = refuse
  end = settings.get("eos_token")
  end = end.get("content") if isinstance(end, dict) else end

  def to_prompt(messages: Sequence[Message]) -> str:
    values = {"bos_token": "", "eos_token": end or "", "add_generation_prompt": True}
    try:
      return environment.from_string(text).render(messages=[*messages], **values)
    except (TemplateError, TypeError, ValueError) as e:
      raise DataError(f"the chat template of {run_dir} fails: {e}", "--no-chat") from e

  return to_prompt
