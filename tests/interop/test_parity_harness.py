# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness gets from a run what its own `hf` model gives for the same weights:
on tasks that are defined here, with data that are written here."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
import yaml
from conftest import beside
from serving_runs import listening, served
from test_transfer import own_run
from tiny_models import LLAMA

from flaxlm.chat.templates import CHAT, plain_chat
from flaxlm.config import ModelConfig
from flaxlm.decoding.loading import load_run
from flaxlm.decoding.tasks import evaluate_tasks, read_tasks
from flaxlm.errors import ConfigError
from flaxlm.interop.transfer import export_run, import_run
from flaxlm.serving.app import build_app
from flaxlm.serving.limits import Limits
from flaxlm.sharding import make_mesh

pytestmark = beside("torch", "transformers", "lm_eval")

TEXTS = ["the cat sat on the mat", "a hat, a cat: théâtre", "the cats that sat there"]
LONG = " ".join(TEXTS * 5)  # longer than the models' contexts
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
  "choices": [
    {"prompt": "the cat", "choices": ["sat", "hat, a hat", "é"], "answer": 0},
    {"prompt": "the ", "choices": ["mat", "cat"], "answer": 1},
    {"prompt": LONG, "choices": ["a", "théâtre"], "answer": 1},
    {"prompt": "a", "choices": ["there", "cat"], "answer": 0},
    {"prompt": "sat:\n", "choices": ["a", "mat"], "answer": 0},
  ],
  "words": [
    {"prompt": text[: text.rindex(" ")], "answer": text[text.rindex(" ") :]}
    for text in [*TEXTS, LONG]
  ],
  "texts": [{"text": text} for text in [*TEXTS, LONG]],
  "questions": [{"prompt": text, "answer": "a"} for text in [*TEXTS, LONG, "c"]],
}
KINDS: dict[str, dict[str, Any]] = {
  "choices": dict(
    output_type="multiple_choice",
    doc_to_text="{{prompt}}",
    doc_to_choice="{{choices}}",
    doc_to_target="answer",
    metric_list=[{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
  ),
  "words": dict(
    output_type="loglikelihood",
    doc_to_text="{{prompt}}",
    doc_to_target="{{answer}}",
    target_delimiter="",
    metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
  ),
  "texts": dict(
    output_type="loglikelihood_rolling",
    doc_to_text="",
    doc_to_target="{{text}}",
    metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
  ),
  "questions": dict(
    output_type="generate_until",
    doc_to_text="{{prompt}}",
    doc_to_target="{{answer}}",
    generation_kwargs={"until": ["\n", "at"], "do_sample": False, "max_gen_toks": 9},
    metric_list=[{"metric": "exact_match"}],
  ),
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """A folder of tasks."""
  for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    monkeypatch.setenv(name, "1")
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  folder = tmp_path / "tasks"
  folder.mkdir()
  for name, documents in DOCUMENTS.items():
    lines = "\n".join(map(json.dumps, documents))
    (folder / f"{name}.jsonl").write_text(lines)
    data = {"test": str(folder / f"{name}.jsonl")}
    kept = str(tmp_path / "datasets")
    task = {
      "task": name,
      "dataset_path": "json",
      "dataset_kwargs": {"data_files": data, "cache_dir": kept},
      "test_split": "test",
      "num_fewshot": 0,
      **KINDS[name],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
  return folder


def evaluated(tasks: Path, model: str, arguments: str, **options: Any) -> Any:
  import lm_eval
  import lm_eval.tasks

  import flaxlm.interop.harness  # noqa: F401 - it registers the model

  manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
  return lm_eval.simple_evaluate(
    model,
    arguments,
    tasks=[*KINDS],
    task_manager=manager,
    batch_size=3,
    bootstrap_iters=0,
    **options,
  )


def numbers(values: Any) -> list[float]:
  """Those in lists and dicts, in order; true is 1."""
  if isinstance(values, dict):
    values = [*values.values()]
  if isinstance(values, (list, tuple)):
    return [number for value in values for number in numbers(value)]
  return [float(values)] if isinstance(values, (int, float)) else []


def compare(tasks: Path, run: Path, folder: Path, **options: Any) -> Any:
  """The results of the run, which are those of the folder, answer by answer."""
  ours = evaluated(tasks, "flaxlm", f"run={run}", **options)
  theirs = evaluated(
    tasks, "hf", f"pretrained={folder},dtype=float32,device=cpu,max_length=64", **options
  )
  for name in KINDS:
    for sample, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
      assert sample["arguments"] == other["arguments"]
      if name == "questions":
        assert sample["resps"] == other["resps"]
      else:
        # Of a log-probability near 0 nothing but the absolute error tells: a share of p.
        expected = pytest.approx(numbers(other["resps"]), rel=1e-5, abs=1e-5)
        assert numbers(sample["resps"]) == expected
    found = numbers(ours["results"][name])  # a perplexity is an exponential
    assert found and found == pytest.approx(numbers(theirs["results"][name]), rel=1e-3)
  return ours


def test_a_run_of_ours(tasks: Path, tmp_path: Path):
  """And `flaxlm eval --tasks` has the same figures for the same file."""
  path = own_run(tmp_path, ModelConfig(width=32, depth=2, context=64))
  run = load_run(path, make_mesh({"data": -1}))
  export_run(run, tmp_path / "out", None, 10**9)
  found = compare(tasks, path, tmp_path / "out")
  written = [sample["resps"][0][0] for sample in found["samples"]["questions"]]
  assert any(written)
  # The harness puts a blank between a prompt and a choice.
  with_blanks = [
    document | {"choices": [f" {choice}" for choice in document["choices"]]}
    for document in DOCUMENTS["choices"]
  ]
  lines = "\n".join(map(json.dumps, with_blanks))
  figures, _ = evaluate_tasks(run, read_tasks(lines, "choices.jsonl"))
  for name in ("acc", "acc_norm", "acc_bytes"):
    assert figures[name] == found["results"]["choices"][f"{name},none"]


def imported(tmp_path: Path, kind: str) -> Path:
  """A folder of the hub, imported as the run `tmp_path / "run"`."""
  import torch
  import transformers

  backend, folder = getattr(tiny_tokenizers, kind)(), tmp_path / "hub"
  begin, end = ("<s>", "</s>") if kind == "llama" else ("<|endoftext|>",) * 2
  ids = dict(bos_token_id=backend.token_to_id(begin), eos_token_id=backend.token_to_id(end))
  sizes = dict(vocab_size=backend.get_vocab_size(), max_position_embeddings=64)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**LLAMA | sizes | ids, initializer_range=0.5)
  model = transformers.LlamaForCausalLM(config)
  with torch.no_grad():  # it writes no byte alone: what such bytes become depends on others
    model.lm_head.weight[3:259] = 0.0
  model.save_pretrained(folder)
  backend.save(str(folder / "tokenizer.json"))
  about = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": begin,
    "eos_token": end,
    "pad_token": end,
    "clean_up_tokenization_spaces": False,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(about))
  (folder / "chat_template.jinja").write_text(
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
  )
  import_run(folder, tmp_path / "run", make_mesh({"data": -1}))
  return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_imported_run(tasks: Path, tmp_path: Path, kind: str):
  """With a tokenizer that begins texts and eats blanks, and with one that does neither; and
  with a chat template."""
  folder = imported(tmp_path, kind)
  compare(tasks, tmp_path / "run", folder)
  if kind == "llama":
    compare(tasks, tmp_path / "run", folder, apply_chat_template=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_same_scores_through_the_server(tasks: Path, tmp_path: Path, kind: str):
  """By the harness's own client, which cuts what is long otherwise than in a process."""
  folder = imported(tmp_path, kind)
  for name, documents in DOCUMENTS.items():
    short = [json.dumps(one) for one in documents if LONG[:40] not in str(one)]
    (tasks / f"{name}.jsonl").write_text("\n".join(short))
  ours = evaluated(tasks, "flaxlm", f"run={tmp_path / 'run'}")
  run = load_run(tmp_path / "run", make_mesh({"data": -1}))
  with served(run, Limits(slots=8)) as service, listening(build_app(service)) as url:
    told = f"model=run,base_url={url}/v1/completions,tokenizer={folder},max_length=64"
    told += f",tokenizer_backend=huggingface,add_bos_token={kind == 'llama'},max_retries=1"
    theirs = evaluated(tasks, "local-completions", told)
  for name in KINDS:
    for sample, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
      assert sample["arguments"] == other["arguments"]
      if name == "questions":  # in a process an answer is decoded without its prompt
        ((found,),), ((written,),) = sample["resps"], other["resps"]
        assert found.lstrip() == written.lstrip()
      else:
        assert numbers(sample["resps"]) == pytest.approx(numbers(other["resps"]), rel=1e-5)
    found = numbers(ours["results"][name])
    assert found and found == pytest.approx(numbers(theirs["results"][name]), rel=1e-3)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setenv("FLAXLM_DATA_DIR", str(tmp_path / "data"))
  from flaxlm.interop.harness import FlaxLM, job_of

  with pytest.raises(ConfigError, match="model_args has pretrained"):
    FlaxLM.create_from_arg_string("pretrained=gpt2")
  with pytest.raises(ConfigError, match="generation_kwargs has 'num_beams'"):
    job_of("a", {"num_beams": 2, "do_sample": False, "until": [], "max_gen_toks": 3}, 0)
  path = own_run(tmp_path, ModelConfig(width=32, depth=1, context=64))
  model = FlaxLM(str(path))
  with pytest.raises(ConfigError, match="has no chat template"):
    model.apply_chat_template([{"role": "user", "content": "a"}])
  chat = plain_chat(model.run.tokenizer, path)
  (path / CHAT).write_text(chat.to_json())
  with pytest.raises(ConfigError, match="reads no special tokens in a text"):
    model.apply_chat_template([{"role": "user", "content": "a"}])
