# SPDX-License-Identifier: Apache-2.0
"""A run in Python gives what the commands print, to anybody who asks in the same words."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import commands_in_process, slow_but
from random_runs import BYTES, HOSTILE, make_run, save_run

import flaxlm
from flaxlm.api import Answer, Completion, Model, Options, Score
from flaxlm.data.storage import data_dir
from flaxlm.decoding.loading import load_run
from flaxlm.decoding.sampling import SamplingSettings
from flaxlm.decoding.weights import prepare_params
from flaxlm.errors import CheckpointError, ConfigError, FlaxLMError
from flaxlm.interop.gguf import export_gguf
from flaxlm.interop.transfer import export_run
from flaxlm.look.embeddings import embedding_table
from flaxlm.look.page import to_json
from flaxlm.look.surprise import light_colours, surprise_html
from flaxlm.runs import IMPORTED_FILES
from flaxlm.sharding import make_mesh
from flaxlm.training.loop import train

FAMILIES = ("decoder", "rnn", "encoder_decoder")
CHAT = (
  "{% for m in messages %}{{ m.role[0] ~ m.content }}{% endfor %}"
  "{% for t in tools or [] %}{{ t.name }}{% endfor %}"
)
SAID = ("ab", "cd e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run of each family below `runs/`; the decoder and the RNN can chat."""
  folder = tmp_path_factory.mktemp("api")
  for family in (*FAMILIES, "encoder"):
    run = save_run(make_run(family, depth=1, context=96), folder / "runs" / family)
    if family in ("decoder", "rnn"):
      (run / IMPORTED_FILES).mkdir()
      settings = json.dumps({"chat_template": CHAT})
      (run / IMPORTED_FILES / "tokenizer_config.json").write_text(settings)
  return folder


@pytest.fixture(scope="module")
def printed(folder: Path, cache_root: Path) -> Iterator[Callable[..., Any]]:
  """What a command prints: the objects of its lines, or its text."""
  with pytest.MonkeyPatch.context() as patch, commands_in_process(cache_root) as command:
    patch.chdir(folder)

    def run(*arguments: str, input: str = "") -> Any:
      done = command(*arguments, input=input)
      assert done.returncode == 0, done.stderr
      lines = done.stdout.splitlines()
      return [*map(json.loads, lines)] if "--json" in arguments else done.stdout

    yield run


@pytest.fixture(scope="module")
def models(printed: Callable[..., Any]) -> dict[str, Model]:
  return {family: flaxlm.load(family) for family in (*FAMILIES, "encoder")}


@pytest.fixture
def decoder(models: dict[str, Model]) -> Model:
  return models["decoder"]


def as_printed(completions: list[Completion]) -> list[dict[str, Any]]:
  return json.loads(json.dumps([completion.as_json() for completion in completions]))


# -- What it writes ------------------------------------------------------------------------


@pytest.mark.parametrize("family", slow_but({"decoder"}, FAMILIES))
def test_it_writes_what_infer_prints(printed, models: dict[str, Model], family: str):
  """With settings, samples and stops; without a temperature it is that of the command."""
  prompts = [f"--prompt={text}" for text in SAID]
  flags = ("--top-p=0.9", "--seed=3", "--max-new-tokens=20", "--stop=é", "--stop-token=9")
  told = printed(
    *("infer", family, *prompts, *flags, "--json"),
    *("--num-samples=2", "--top-logprobs=2", "--logit-bias=97=2"),
  )
  asked: Options = dict(top_p=0.9, seed=3, max_new_tokens=20, stop="é", stop_tokens=[9])
  asked |= dict(num_top=2, logit_bias={97: 2.0})
  found = models[family].generate([*SAID], num_samples=2, **asked)
  assert as_printed(found) == told
  assert len({completion.completion for completion in found}) == 4


@pytest.mark.parametrize("family", slow_but({"rnn"}, FAMILIES))
def test_a_string_gives_one_and_its_pieces_add_up(models: dict[str, Model], family: str):
  model = models[family]
  asked: Options = dict(max_new_tokens=20, seed=1)
  alone = model.generate("ab", **asked)
  assert isinstance(alone, Completion) and alone.finish_reason == "length"
  assert [alone] == model.generate(["ab"], **asked)
  assert [alone] == model.generate("ab", num_samples=1, **asked)
  pieces = [*model.stream("ab", **asked)]
  assert len(pieces) > 1 and "".join(pieces) == alone.completion
  (first,) = itertools.islice(model.stream("ab", **asked), 1)
  assert first == pieces[0]


def test_nothing_is_asked_of_no_prompt(decoder: Model):
  assert decoder.generate([]) == decoder.generate((), num_samples=2) == []
  assert decoder.score([]) == []


def test_lists_may_be_iterators(decoder: Model):
  asked: Options = dict(max_new_tokens=8, temperature=0)
  (likeliest, *_) = decoder.generate("ab", **asked).tokens
  ids = [likeliest, 5]
  without = decoder.generate("ab", banned_tokens=ids, **asked)
  assert likeliest not in without.tokens
  assert decoder.generate("ab", banned_tokens=iter(ids), **asked) == without
  for name in ("banned_tokens", "stop_tokens"):
    found = [decoder.generate("ab", **{name: some}, **asked) for some in (ids, iter(ids))]
    assert found[0] == found[1]
  assert decoder.generate(iter(["ab"]), **asked) == decoder.generate(["ab"], **asked)


def test_an_answer_has_its_form(decoder: Model):
  asked: Options = dict(max_new_tokens=40, temperature=0)
  assert decoder.generate("ab", regex="(yes|no)", **asked).completion in ("yes", "no")
  schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
  for given in (schema, json.dumps(schema)):
    found = decoder.generate("ab", json_schema=given, **asked)
    assert json.loads(found.completion)["n"] in (1, 2)


def test_options_are_the_settings_of_the_commands():
  settings = {field.name for field in dataclasses.fields(SamplingSettings)}
  ours = {"json_schema", "max_new_tokens", "stop", "stop_tokens", "max_seconds", "num_top"}
  assert set(Options.__annotations__) == settings - {"row", "sample"} | ours


@pytest.mark.slow
def test_weights_cache_and_drafts_are_those_of_the_command(printed, decoder: Model):
  narrow = flaxlm.load("runs/decoder", weights="int8", cache="int8", mesh="fsdp=8")
  flags = ("--weights=int8", "--cache=int8", "--mesh=fsdp=8", "--max-new-tokens=20")
  told = printed("infer", "decoder", "--prompt=ab", *flags, "--json")
  assert as_printed([narrow.generate("ab", max_new_tokens=20)]) == told
  for draft in ("ngram", "decoder"):
    fast = flaxlm.load("decoder", draft=draft, draft_tokens=3)
    found = fast.generate("ab", max_new_tokens=20)
    assert found.tokens == decoder.generate("ab", max_new_tokens=20).tokens


# -- Conversations -------------------------------------------------------------------------


@pytest.mark.parametrize("family", slow_but({"decoder"}, ("decoder", "rnn")))
def test_a_conversation_is_that_of_the_command(printed, models, family: str):
  flags = ("--max-new-tokens=8", "--temperature=0", "--system=S")
  lines = "".join(f"{text}\n" for text in SAID)
  told = printed("infer", family, "--interactive", *flags, input=lines)
  messages: list[Any] = [{"role": "system", "content": "S"}]
  for text in SAID:
    messages.append({"role": "user", "content": text})
    answer = models[family].chat(messages, max_new_tokens=8, temperature=0)
    assert answer == {"role": "assistant", "content": answer.completion.completion}
    messages.append(answer)
  answers = [message["content"] for message in messages if message["role"] == "assistant"]
  assert len(set(answers)) == 2 and told == "".join(f"{text}\n" for text in answers)


def test_tools_and_other_messages_reach_the_template(decoder: Model):
  messages = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "tool", "content": "1"},
  ]
  found = decoder.chat(messages, tools=[{"name": "T"}], max_new_tokens=2)
  assert found.completion.prompt == "uaat1T"


def test_turns_that_do_not_fit_are_dropped_with_a_warning(decoder: Model):
  turns = [{"role": "user", "content": letter * 30} for letter in "abcd"]
  messages = [{"role": "system", "content": "S"}, *turns]
  with pytest.warns(UserWarning, match=r"model\.context=96: turns dropped.*: 2") as told:
    found = decoder.chat(messages, max_new_tokens=8)
  assert found.completion.prompt == f"sSu{'c' * 30}u{'d' * 30}"
  assert told[0].filename == __file__


# -- What it reads -------------------------------------------------------------------------


@pytest.mark.parametrize("family", slow_but({"decoder"}, FAMILIES))
def test_scores_are_those_of_eval(printed, models, family: str, folder: Path):
  task = {"prompt": "ab ", "choices": ["cd", "c", "é " * 9], "answer": 0}
  (folder / "tasks.jsonl").write_text(json.dumps(task))
  printed("eval", family, "--tasks=tasks.jsonl", "--output=answers.jsonl")
  told = json.loads((folder / "answers.jsonl").read_text())["logprobs"]
  found = models[family].score([(task["prompt"], choice) for choice in task["choices"]])
  assert [score.logprob for score in found] == pytest.approx(told, rel=1e-5)
  for score, choice in zip(found, task["choices"], strict=True):
    assert (score.context, score.text, score.num_cut) == ("ab ", choice, 0)
    assert BYTES.decode(score.tokens) == f" {choice}"
    assert math.fsum(score.logprobs) == pytest.approx(score.logprob, rel=1e-5)
    assert len(score.logprobs) == len(score.tokens)


def test_a_text_is_scored_token_by_token(decoder: Model):
  """Those of a completion are those that it was drawn with."""
  text = "ab" * 90  # longer than the context
  one, other = decoder.score([text, "ab"])
  assert BYTES.decode(one.tokens) == text and len(one.logprobs) == 180
  alone = decoder.score("ab")
  assert isinstance(alone, Score) and alone.logprobs == other.logprobs
  assert alone.logprobs == pytest.approx(one.logprobs[:2], rel=1e-5)
  greedy = decoder.generate("ab", temperature=0, max_new_tokens=8)
  if BYTES.encode(greedy.completion) == greedy.tokens:
    (found,) = decoder.score([("ab", greedy.completion)])
    assert found.is_greedy
    np.testing.assert_allclose(found.logprobs, greedy.logprobs, atol=1e-4)


def test_vectors_are_those_of_embed(printed, models: dict[str, Model]):
  texts = [f"--text={text}" for text in SAID]
  told = printed("embed", "encoder", *texts, "--json", "--normalise")
  found = models["encoder"].embed([*SAID], normalise=True)
  assert isinstance(found, np.ndarray) and found.shape == (2, 16)
  np.testing.assert_array_equal(found, np.array([x["embedding"] for x in told], "f4"))
  alone = models["encoder"].embed("ab")
  assert alone.shape == (16,)
  np.testing.assert_allclose(alone / np.linalg.norm(alone), found[0], rtol=1e-4)


# -- What is refused -----------------------------------------------------------------------

REFUSED: dict[str, Callable[[dict[str, Model]], Any]] = {
  "unknown option topp": lambda m: m["decoder"].generate("a", topp=0.9),
  "did you mean top_p": lambda m: m["decoder"].stream("a", topp=0.9),
  "unknown option row": lambda m: m["decoder"].generate("a", row=1),
  "top-p is 3": lambda m: m["decoder"].stream("a", top_p=3),
  "temperature is 'hot'": lambda m: m["decoder"].generate("a", temperature="hot"),
  "num_samples is 0": lambda m: m["decoder"].generate("a", num_samples=0),
  "max_new_tokens is 2.5": lambda m: m["decoder"].generate("a", max_new_tokens=2.5),
  "num_top is True": lambda m: m["decoder"].generate("a", num_top=True),
  "stop-tokens are 5": lambda m: m["decoder"].generate("a", stop_tokens=5),
  "banned-tokens are 5": lambda m: m["decoder"].generate("a", banned_tokens=5),
  "a stop string is empty": lambda m: m["decoder"].generate("a", stop=""),
  "regex with json_schema": lambda m: m["decoder"].generate("a", regex="a", json_schema={}),
  "the prompt is 3": lambda m: m["decoder"].generate(3),
  "prompt 2 is None": lambda m: m["decoder"].generate(["a", None]),
  r"the prompt is \['a'\]": lambda m: m["decoder"].stream(["a"]),
  "prompt 1 is not UTF-8": lambda m: m["decoder"].generate("\ud800"),
  r"prompt of 201 tokens \+ 1 new": lambda m: m["decoder"].stream("a" * 200),
  "is an encoder: it writes no text\n  embed": lambda m: m["encoder"].generate("a"),
  "it writes no text": lambda m: m["encoder"].chat([]),
  "does not say how likely": lambda m: m["encoder"].score("a"),
  "it scores no text by itself": lambda m: m["encoder_decoder"].score("a"),
  "pair 2 is 'b'": lambda m: m["decoder"].score([("a", "b"), "b"]),
  "the text is 3": lambda m: m["decoder"].score(3),
  "text 1 is 3": lambda m: m["decoder"].score([3]),
  "no token of its own": lambda m: m["decoder"].score([("a", "")]),
  "is not an encoder": lambda m: m["decoder"].embed("a"),
  "there is no text": lambda m: m["encoder"].embed([]),
  "conversation 1 is not UTF-8": lambda m: m["decoder"].chat(
    [{"role": "user", "content": "\ud800"}]
  ),
  "there is no message": lambda m: m["decoder"].chat([]),
  "messages are 'hi', not a list": lambda m: m["decoder"].chat("hi"),
  "message 1 has no role": lambda m: m["decoder"].chat([{"content": "a"}]),
  "message 1 has no content": lambda m: m["decoder"].chat([{"role": "user"}]),
  "tools are 3": lambda m: m["decoder"].chat([{"role": "user", "content": "a"}], tools=3),
  "has no chat template": lambda m: m["encoder_decoder"].chat([]),
  "weights is 'int3'": lambda m: flaxlm.load("decoder", weights="int3"),
  "cache is 'int4'": lambda m: flaxlm.load("decoder", cache="int4"),
  "draft_tokens without a draft": lambda m: flaxlm.load("decoder", draft_tokens=2),
  "has no narrow weights or cache, and": lambda m: flaxlm.load("encoder", weights="int8"),
  "an RNN has no narrow weights": lambda m: flaxlm.load("rnn", weights="int8"),
  "unknown mesh axis 'model'": lambda m: flaxlm.load("decoder", mesh="model=2"),
  "draft_tokens is 'x'": lambda m: flaxlm.load("rnn", draft="ngram", draft_tokens="x"),
  "draft_tokens is 0": lambda m: flaxlm.load("decoder", draft="ngram", draft_tokens=0),
  "mesh is 3": lambda m: flaxlm.load("decoder", mesh=3),
  "runs_dir is 3": lambda m: flaxlm.load("decoder", runs_dir=3),
  "the path of a run is 3": lambda m: flaxlm.load(3),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_wrong_is_said_in_a_line(models: dict[str, Model], said: str):
  with pytest.raises(FlaxLMError, match=said) as caught:
    REFUSED[said](models)
  assert isinstance(caught.value, ConfigError) and "\n" not in caught.value.cause


def test_a_folder_that_is_no_run_says_what_to_do(models, tmp_path: Path):
  with pytest.raises(CheckpointError, match="runs here: decoder, encoder"):
    flaxlm.load("decodr")
  with pytest.raises(CheckpointError, match="org/name is not in"):
    flaxlm.load("org/name")
  with pytest.raises(CheckpointError, match="runs here: "):
    flaxlm.load("x" * 5000)
  with pytest.raises(CheckpointError, match="runs here: none"):
    flaxlm.load("decoder", runs_dir=tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(CheckpointError, match="has neither"):
    flaxlm.load(tmp_path)
  (tmp_path / "a.gguf").write_bytes(b"none")
  with pytest.raises(CheckpointError, match="GGUF"):
    flaxlm.load(tmp_path / "a.gguf")


@pytest.mark.slow
def test_checkpoints_of_others_are_imported_once(models, decoder: Model, tmp_path: Path):
  run = load_run(decoder.run.path, make_mesh({"data": -1}))
  folder, file = tmp_path / "hub", tmp_path / "model.gguf"
  export_run(run, folder, None, 10**9)
  export_gguf(run, file, None)
  expected = decoder.generate("ab", temperature=0, max_new_tokens=8)
  for path in (folder, file):
    for _ in range(2):
      again = flaxlm.load(path)
      assert again.generate("ab", temperature=0, max_new_tokens=8) == expected
  runs = [*(data_dir() / "imported").glob("*/config.json")]
  assert len(runs) == 2


# -- What a notebook shows -----------------------------------------------------------------


class Spans(HTMLParser):
  """The elements of a piece of HTML, and the texts that they have."""

  def __init__(self, html: str):
    super().__init__()
    self.tags: list[str] = []
    self.attributes: list[dict[str, str | None]] = []
    self.texts: list[str] = []
    self.feed(html)
    self.close()

  def handle_starttag(self, tag: str, attributes: list) -> None:
    self.tags.append(tag)
    self.attributes.append(dict(attributes))
    self.texts.append("")

  def handle_data(self, data: str) -> None:
    self.texts[-1] += data


def test_tokens_have_the_colour_of_their_surprise(decoder: Model):
  found = decoder.generate("a<b>", max_new_tokens=9, temperature=0)
  shown = Spans(found._repr_html_())
  assert shown.tags == ["pre", *["span"] * 11]  # prompt, tokens, figures
  assert shown.texts[1] == "a<b>"
  for logprob, token, attributes in zip(
    found.logprobs, found.tokens, shown.attributes[2:11], strict=True
  ):
    bits = abs(logprob) / math.log(2)
    title = attributes["title"] or ""
    assert title.startswith(f"id {token}, probability {math.exp(logprob):.3g}, ")
    assert title.endswith(f"{bits:.2f} bits of surprise")
  total = -sum(found.logprobs) / math.log(2)
  assert shown.texts[-1].startswith(f"9 tokens, {total:.1f} bits of surprise, ")


def test_colours_go_from_those_of_the_page_to_its_darkest():
  colours = light_colours()
  assert colours["low"] == "#ffffff" and colours["high"] == "#0a3d85"
  logprobs = [0.0, -8 * math.log(2), -16 * math.log(2), -math.inf]
  styles = [x["style"] for x in Spans(surprise_html(BYTES, b"abcd", logprobs)).attributes]
  of_tokens = [(style or "").partition(";unicode")[0] for style in styles[2:-1]]
  light, dark = f"color:{colours['ink']}", f"color:{colours['on-high']}"
  assert of_tokens == [
    f"background:rgb(255,255,255);{light}",
    f"background:rgb(132,158,194);{light}",
    f"background:rgb(10,61,133);{dark}",
    f"background:rgb(10,61,133);{dark}",
  ]


def test_hostile_text_stays_text(decoder: Model):
  """As a prompt, as tokens, in an answer and in a score: no element, no attribute."""
  hostile = HOSTILE + "\"' onmouseover=alert(1) <img src=x onerror=alert(1)>"
  ids = BYTES.encode(hostile)
  pieces = {
    "before": surprise_html(BYTES, [], [], before=hostile),
    "tokens": surprise_html(BYTES, ids, [-1.0] * len(ids)),
    "score": decoder.score([(hostile[:30], hostile[30:60])])[0]._repr_html_(),
  }
  completion = Completion(hostile, hostile, ids, [-1.0] * len(ids))
  completion.tokenizer = BYTES
  pieces |= {"completion": completion._repr_html_()}
  pieces |= {"answer": Answer(completion)._repr_html_()}
  for name, piece in pieces.items():
    shown = Spans(piece)
    assert set(shown.tags) == {"pre", "span"}, name
    assert {key for x in shown.attributes for key in x} <= {"style", "title"}, name
    assert "\u202e" not in piece and "http" not in piece and "url(" not in piece, name
  text = "".join(Spans(pieces["before"]).texts)
  assert text.startswith("</script><script>document.title='broken'</script><!-- & ")
  assert "\\u202e" in text and "↵\n" in text


@pytest.mark.parametrize("subject", ["attention", "tokens", "embeddings"])
def test_a_picture_is_the_page_that_its_command_writes(
  decoder: Model, printed: Callable[..., Any], folder: Path, tmp_path: Path, subject: str
):
  """Though the model's parameters are laid out for decoding, and the command's are not."""
  text = [] if subject == "embeddings" else ["a</iframe>\"'b"]
  picture, flags = decoder.look(subject, *text), [f"--text={given}" for given in text]
  (figures,) = printed("look", subject, "decoder", *flags, "--json")
  numbers = lambda tree: [x for x in jax.tree.leaves(tree) if isinstance(x, float)]
  found = json.loads(to_json(picture.figures))
  expected = {key: figures[key] for key in found}
  assert numbers(found) == pytest.approx(numbers(expected), rel=1e-3, abs=1e-5)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  picture.save(tmp_path / "page.html")
  shown = Spans(picture._repr_html_())
  assert shown.tags == ["iframe"] and shown.attributes[0]["sandbox"] == "allow-scripts"
  assert shown.attributes[0]["srcdoc"] == (tmp_path / "page.html").read_text("utf-8")


def test_a_picture_of_nothing_is_refused(decoder: Model, models: dict[str, Model]):
  for arguments, said in (
    (("embedding",), "there is no picture of 'embedding'"),
    (("embeddings", "ab"), "the embeddings are of no text"),
    (("attention",), "there is no text"),
    (([],), r"there is no picture of \[\]"),
    (("tokens", b"ab"), "text is b'ab'"),
  ):
    with pytest.raises(ConfigError, match=said):
      decoder.look(*arguments)
  with pytest.raises(ConfigError, match="has no attention"):
    models["rnn"].look("attention", "ab")
  with pytest.raises(ConfigError, match=r"neither \.html nor \.png"):
    decoder.look("tokens", "ab").save("page.pdf")
  with pytest.raises(ConfigError, match="source is 5"):
    models["encoder_decoder"].look("tokens", "ab", source=5)  # type: ignore[arg-type]
  with pytest.raises(ConfigError, match="the path of a picture is 5"):
    decoder.look("tokens", "ab").save(5)  # type: ignore[arg-type]


def test_a_table_of_int8_is_read_with_its_scales(folder: Path):
  run = load_run(folder / "runs" / "decoder", make_mesh({"data": -1}))
  table_VD = embedding_table(run.params)
  narrow_VD = embedding_table(prepare_params(run.params, run.model.cfg, "int8"))
  limit_V1 = np.abs(table_VD).max(1, keepdims=True) / 127
  assert table_VD.shape == narrow_VD.shape
  assert np.abs(table_VD - narrow_VD).max() > 0
  assert (np.abs(table_VD - narrow_VD) <= 0.51 * limit_V1).all()


def test_training_is_at_the_front_door():
  assert flaxlm.train is train
