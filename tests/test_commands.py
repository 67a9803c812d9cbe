# SPDX-License-Identifier: Apache-2.0
"""The commands, end to end, as a user runs them, and their answers to bad input."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, slow_but, tiny


def metrics(tmp_path, name="stdlib_tiny"):
  lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def losses(tmp_path, name):
  return {m["step"]: m["train/loss"] for m in metrics(tmp_path, name) if "train/loss" in m}


def test_train_infer_eval_ckpt(flaxlm, in_process, corpus, tmp_path):
  """The main job on the user's own text, then every command on what it left."""
  run = flaxlm("train", *tiny(corpus, training__num_steps=6))
  assert run.returncode == 0, run.stderr
  assert run.stdout.startswith("a"), "the sample, alone on stdout"
  assert "python infer.py" in run.stderr
  hints = run.stderr.partition("next, try:")[2]
  assert "--name=stdlib_tiny_longer --training.num-steps=12" in hints
  assert f"--data.corpus={corpus}" in hints, "the user's own text"
  assert "--training.num_steps=6" not in hints
  records = metrics(tmp_path)
  assert [m["step"] for m in records if "train/loss" in m] == [1, 2, 3, 4, 5, 6]
  evaluations = [m for m in records if "eval/loss" in m]
  assert [m["step"] for m in evaluations] == [4, 6]
  assert {"eval/perplexity", "eval/bits_per_byte", "eval/gzip_bits_per_byte"} <= set(
    evaluations[0]
  )
  folder = tmp_path / "runs" / "stdlib_tiny"
  left = {path.name for path in folder.iterdir()}
  assert {"config.json", "tokenizer.json", "checkpoints", "log.txt", "sample.txt"} <= left
  assert list(folder.glob("events.out.tfevents.*"))

  run = in_process(
    "infer", "--prompt", "3 times", "--max-new-tokens=5", "--json", "--num-samples=2"
  )
  assert run.returncode == 0, run.stderr
  assert run.stderr.count("taking the newest, runs/stdlib_tiny") == 1
  samples = [json.loads(line) for line in run.stdout.splitlines()]
  assert len(samples) == 2
  for sample in samples:
    keys = ["prompt", "completion", "tokens", "logprobs", "finish_reason"]
    assert list(sample) == keys
    assert 1 <= len(sample["tokens"]) == len(sample["logprobs"]) <= 5

  run = in_process(
    "infer", "stdlib_tiny", "--interactive", "--temperature=0", input="1 t\n2 t\n"
  )
  assert run.returncode == 0, run.stderr
  assert run.stdout.startswith("1 t")
  assert "\n2 t" in run.stdout

  (tmp_path / "in.jsonl").write_text('{"prompt": "2 t"}\n{"prompt": "1 times"}\n')
  job = ("--prompt-file=in.jsonl", "--output=out.jsonl", "--draft=ngram", "--verbose")
  run = in_process(
    "infer", *job, "--max-new-tokens=4", "--weights=int8", "--top-logprobs=2"
  )
  assert run.returncode == 0, run.stderr
  assert "programs compiled" in run.stderr
  answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [answer["prompt"] for answer in answers] == ["2 t", "1 times"]
  assert all(len(step) == 2 for step in answers[0]["top_logprobs"])

  run = in_process("eval", "--json")
  assert run.returncode == 0, run.stderr
  value = json.loads(run.stdout)["eval/bits_per_byte"]
  assert value == pytest.approx(evaluations[-1]["eval/bits_per_byte"], rel=1e-5)
  found = json.loads(run.stdout)
  assert (found["corpus"], found["split"]) == (corpus, "validation")
  (tmp_path / "one.txt").write_text("7 times é" * 9)
  run = in_process("eval", "--corpus=files:one.txt", "--json")
  assert run.returncode == 0, run.stderr
  found = json.loads(run.stdout)
  assert (found["corpus"], found["split"]) == ("files:one.txt", "whole")
  assert found["tokens"] == found["bytes"] == 90, "each byte, and no end after the last"
  (tmp_path / "one.jsonl").write_text('{"body": "7 times"}\n' * 9)
  named = ("--text-field=body", "--json")
  run = in_process("eval", "--corpus=files:one.jsonl", *named)
  assert run.returncode == 0, run.stderr
  assert json.loads(run.stdout)["bytes"] == 9 * len("7 times")
  run = in_process("eval", "--corpus=files:one.jsonl")
  assert run.returncode == 3 and "--text-field of eval" in run.stderr
  run = in_process("eval", *named)
  assert run.returncode == 2 and "--text-field without --corpus" in run.stderr

  lines = [
    {"prompt": "3 times", "choices": [" 4 is 12.", " zebra"], "answer": 0, "id": 7},
    {"prompt": "2 times 3 is", "answer": "6.", "max_new_tokens": 4},
  ]
  (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
  command = ("eval", "runs/stdlib_tiny", "--tasks=tasks.jsonl")
  run = in_process(*command, "--json", "--output=out.jsonl")
  assert run.returncode == 0, run.stderr
  found = json.loads(run.stdout)
  assert [*found] == [
    *("step", "tasks", "num_tasks", "num_cut", "num_multiple_choice", "num_questions"),
    *("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "acc_bytes"),
    *("acc_bytes_stderr", "exact_match", "exact_match_stderr"),
  ]
  assert (found["step"], found["num_tasks"], found["acc_stderr"]) == (6, 2, None)
  answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [answer["line"] for answer in answers] == [1, 2] and answers[0]["id"] == 7
  run = in_process(*command)
  assert "on 1 multiple-choice tasks; exact match" in run.stdout

  with pytest.MonkeyPatch.context() as patch:  # nothing need be written
    patch.setenv("FLAXLM_DATA_DIR", "/dev/full/data")
    run = in_process("infer", "--prompt=1", "--max-new-tokens=1")
    assert run.returncode == 0, run.stderr

  run = in_process("ckpt", "verify")
  assert run.returncode == 0
  assert "taking the newest, runs/stdlib_tiny" in run.stderr
  (step,) = {p.parent for p in folder.glob("checkpoints/6/params")}
  victim = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 1
  victim.write_bytes(data)
  run = in_process("ckpt", "verify")
  assert run.returncode == 4
  assert victim.name in run.stdout
  run = in_process("infer", "--prompt=1", "--max-new-tokens=1")
  assert run.returncode == 0, "the older checkpoint is whole"
  assert "damaged" in run.stderr

  # No manifest at all: nothing is trusted, and nothing is deleted.
  for path in folder.glob("checkpoints/*/MANIFEST.json"):
    path.unlink()
  files = {path for path in folder.glob("checkpoints/**/*") if path.is_file()}
  for command in (["train", *tiny(corpus)], ["infer", "--prompt=1"], ["ckpt", "verify"]):
    run = in_process(*command)
    assert run.returncode == 4, run.stderr
    assert "MANIFEST.json: missing" in run.stdout + run.stderr
  assert {path for path in folder.glob("checkpoints/**/*") if path.is_file()} == files

  config = folder / "config.json"
  config.write_text(config.read_text().replace('"logit_scale": 1.0', '"logit_scale": 7.0'))
  for command in (["eval"], ["ckpt", "verify", "--json"]):
    run = in_process(*command)
    assert run.returncode == 4, run.stderr
    assert "config.json: damaged" in run.stdout + run.stderr


@pytest.mark.slow
def test_a_mixture_is_trained_on_and_evaluated_by_source(in_process, corpus, tmp_path):
  """Of texts and of records in a field of another name; its run is scored as it was."""
  records = "".join(f'{{"body": "{n} and {n + 1}"}}\n' for n in range(300))
  (tmp_path / "sums.jsonl").write_text(records)
  mixture = f"0.75 {corpus} + 0.25 files:sums.jsonl"
  steps = {"training__num_steps": 4, "data__text_field": "body"}
  run = in_process("train", *tiny(mixture, **steps))
  assert run.returncode == 0, run.stderr
  assert shlex.quote(f"--data.corpus={mixture}") in run.stderr, "the hint can be pasted"
  (evaluation,) = (m for m in metrics(tmp_path) if "eval/loss" in m)
  for source in (corpus, "files:sums.jsonl"):
    assert f"{source} {evaluation[f'eval/loss/{source}']:.3f}" in run.stderr
  run = in_process("eval", "--json")
  found = json.loads(run.stdout)
  for key, value in evaluation.items():
    if key.startswith("eval/"):
      assert found[key] == pytest.approx(value, rel=1e-5), key
  run = in_process("train", *tiny(f"0 {corpus} + 1 files:sums.jsonl", **steps))
  assert run.returncode == 2
  assert f"'0 {corpus}' has no positive weight" in run.stderr
  assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_stop_and_resume_equals_never_stopped(flaxlm, in_process, corpus, tmp_path):
  """Stopped between two checkpoints and resumed: every later loss, bit for bit."""

  def arguments(name, **knobs):
    return tiny(corpus, name=name, model__dropout=0.1, training__num_steps=9, **knobs)

  run = in_process("train", *arguments("whole"))
  assert run.returncode == 0, run.stderr
  short = "optimizer.warmup_steps=50 is not less than training.num_steps=9: the learning "
  assert f"{short}rate ends at 16% of optimizer.learning_rate" in run.stderr
  stopped = subprocess.run(
    [sys.executable, "-c", STOP_AT_FIVE, *arguments("halves", simulated_devices=8)],
    cwd=tmp_path,
    env=os.environ | flaxlm.environment,
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert stopped.returncode == 75, stopped.stderr
  assert 5 <= max(losses(tmp_path, "halves")) < 9
  run = in_process("train", *arguments("halves"))
  assert run.returncode == 0, run.stderr
  assert "resuming" in run.stderr
  assert losses(tmp_path, "halves") == losses(tmp_path, "whole")

  run = in_process("train", *arguments("halves", model__width=32))
  assert run.returncode == 4
  assert "model.width was 16, now 32" in run.stderr
  run = in_process("train", *arguments("halves", mesh="fsdp=8"))
  assert run.returncode == 0, run.stderr
  assert "already finished at step 9: nothing to train" in run.stderr
  assert "next, try" in run.stderr, "a finished run shows its sample, on any mesh"


# A SIGTERM at a known step: after the fifth line of metrics.
STOP_AT_FIVE = """
import os, signal, sys
from flaxlm import cli
from flaxlm.training.reporting import Reporter
write = Reporter.metrics
def stop(self, step, values):
  write(self, step, values)
  if step == 5:
    os.kill(os.getpid(), signal.SIGTERM)
Reporter.metrics = stop
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


# A signal while a module is being imported, as in the first second.
SIGNALLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored behind a shell's &
class Finder:
  def find_spec(self, name, *_):
    if name == sys.argv[2]:
      os.kill(os.getpid(), int(sys.argv[1]))
sys.meta_path.insert(0, Finder())
from flaxlm import cli
sys.exit(cli.main(["train", *sys.argv[3:]]))
"""
EARLY, LATER = ("flaxlm.commands.train", "jax._src.core"), ("numpy", "jaxlib._jax", "optax")


@pytest.mark.parametrize("module", slow_but(EARLY, [*EARLY, *LATER]))
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_in_the_first_second_ends_as_later(
  flaxlm, corpus, tmp_path, number, code, module
):
  run = subprocess.run(
    [sys.executable, "-c", SIGNALLED, str(int(number)), module, *tiny(corpus)],
    cwd=tmp_path,
    env=os.environ | flaxlm.environment,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert run.returncode == code, run.stderr
  assert run.stderr in ("", "flaxlm: stopped by SIGTERM\n")
  assert not (tmp_path / "runs").exists()


def start_training(flaxlm, tmp_path, arguments):
  """`flaxlm train`, which goes on while the test does."""
  return subprocess.Popen(
    [sys.executable, "-m", "flaxlm.cli", "train", *arguments],
    cwd=tmp_path,
    env=os.environ | flaxlm.environment,
    stderr=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
  )


def wait_for(child, happened):
  """Waits until something has happened or the child has ended."""
  while child.poll() is None and not happened():
    time.sleep(0.05)
  assert happened(), f"the child ended with {child.returncode}"


def test_kill_and_resume(flaxlm, in_process, corpus, tmp_path):
  """SIGKILL at any moment: the next start resumes from the last whole checkpoint."""

  def arguments(num_steps):
    knobs = dict(name="k", checkpoint__every_steps=2, training__num_steps=num_steps)
    return tiny(corpus, **knobs)

  child = start_training(flaxlm, tmp_path, arguments(100_000))
  checkpoints = tmp_path / "runs" / "k" / "checkpoints"
  wait_for(child, lambda: list(checkpoints.glob("*/MANIFEST.json")))
  child.send_signal(signal.SIGKILL)
  child.wait()
  saved = max(int(p.parent.name) for p in checkpoints.glob("*/MANIFEST.json"))
  (checkpoints / str(saved + 2)).mkdir(exist_ok=True)  # as if killed before its manifest
  (checkpoints / str(saved + 2) / "MANIFEST.json").unlink(missing_ok=True)
  run = in_process("train", *arguments(saved + 2), "--checkpoint.resume=must")
  assert run.returncode == 0, run.stderr
  assert sorted(losses(tmp_path, "k")) == list(range(1, saved + 3))


@pytest.mark.slow
def test_end_of_data_saves_and_says_so(in_process, corpus, tmp_path):
  run = in_process("train", *tiny(corpus, data__num_epochs=1, training__num_steps=100_000))
  assert run.returncode == 0, run.stderr
  assert "the data end after step" in run.stderr
  last = max(m["step"] for m in metrics(tmp_path))
  assert (tmp_path / "runs" / "stdlib_tiny" / "checkpoints" / str(last)).is_dir()
  # It was the text to learn from, each token of which but the first is predicted once.
  said = re.search(r"([\d,]+) tokens to learn from, ([\d,]+) held out", run.stderr)
  num_tokens, held_out = (int(number.replace(",", "")) for number in said.groups())
  assert held_out < num_tokens / 2
  assert last == math.ceil(math.ceil((num_tokens - 1) / 32) / 8)


@pytest.mark.slow
def test_two_trainers_in_one_directory(flaxlm, in_process, corpus, tmp_path):
  """The second is refused; the first never notices."""
  arguments = tiny(corpus, training__num_steps=1_000_000)
  child = start_training(flaxlm, tmp_path, arguments)
  try:
    lock = tmp_path / "runs" / "stdlib_tiny" / "config.json"
    wait_for(child, lock.exists)
    run = in_process("train", *arguments)
    assert run.returncode == 4
    assert "another process trains into" in run.stderr
  finally:
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 75


@pytest.mark.slow
def test_divergence_stops_with_its_own_code(in_process, corpus, tmp_path):
  knobs = dict(
    optimizer__learning_rate=1e38, optimizer__warmup_steps=0, optimizer__clip_norm=None
  )
  run = in_process("train", *tiny(corpus, training__num_steps=50, **knobs))
  assert run.returncode == 5, run.stderr
  assert "lower --optimizer.learning-rate" in run.stderr
  for line in (tmp_path / "runs/stdlib_tiny/metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=pytest.fail)  # NaN is not JSON
  assert not list(tmp_path.glob("runs/stdlib_tiny/checkpoints/[0-9]*"))


@pytest.mark.slow
def test_sharded_over_simulated_devices(flaxlm, corpus, tmp_path):
  """The same losses on one device and on data=2,fsdp=2,tensor=2, as a user asks for it."""
  arguments = tiny(corpus, training__num_steps=3)
  one = flaxlm("train", *arguments, "--name=one")
  eight = flaxlm(
    "train",
    *arguments,
    "--name=eight",
    "--simulated_devices=8",
    "--mesh=data=2,fsdp=2,tensor=2",
  )
  assert one.returncode == eight.returncode == 0, one.stderr + eight.stderr
  expected = losses(tmp_path, "one")
  assert losses(tmp_path, "eight") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_fewer_kv_heads_than_members_of_tensor(in_process, corpus, tmp_path):
  """They are on several devices, of which no file knows."""
  heads = {"model__num_heads": 8, "model__num_kv_heads": 2, "model__head_dim": 4}
  knobs = heads | {"training__num_steps": 2, "training__sample_prompt": ""}
  done = in_process("train", *tiny(corpus, name="copies", mesh="tensor=8", **knobs))
  assert done.returncode == 0, done.stderr
  assert "mesh tensor=8 with each kv head on 4 devices" in done.stderr
  done = in_process("export", "runs/copies", "exported")
  assert done.returncode == 0, done.stderr
  settings = json.loads((tmp_path / "exported/config.json").read_text())
  assert settings["num_key_value_heads"] == 2
  done = in_process("import", "exported", "runs/again", "--mesh=tensor=8")
  assert done.returncode == 0, done.stderr
  words = (
    "--prompt=1 t",
    "--max-new-tokens=9",
    "--temperature=0",
    "--cache=int8",
    "--json",
  )
  answers = []
  for run in (("copies", "--mesh=data=8"), ("again", "--mesh=fsdp=2,tensor=4")):
    done = in_process("infer", *run, *words)
    assert done.returncode == 0, done.stderr
    answers.append(json.loads(done.stdout)["tokens"])
  assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_vocabulary_is_padded_for_a_mesh_and_stays_so(in_process, corpus, tmp_path):
  """A run begun on tensor=2 continues without it; an export has only the real ids."""
  knobs = {"name": "p", "model__vocab_size": 259}
  cut = tiny(corpus, training__num_steps=2, mesh="data=4,tensor=2", **knobs)
  run = in_process("train", *cut)
  assert run.returncode == 0, run.stderr
  assert "259 ids, padded to 320 rows" in run.stderr
  model = json.loads((tmp_path / "runs/p/config.json").read_text())["model"]
  assert (model["vocab_size"], model["num_ids"]) == (320, 259)
  run = in_process("train", *tiny(corpus, training__num_steps=4, **knobs))
  assert run.returncode == 0, run.stderr
  assert "resuming runs/p at step 2" in run.stderr and "padded to 320" in run.stderr
  assert sorted(losses(tmp_path, "p")) == [1, 2, 3, 4]
  run = in_process("train", *tiny(corpus, **knobs | {"model__vocab_size": 260}))
  assert run.returncode == 4 and "another experiment" in run.stderr
  run = in_process("infer", "p", "--prompt=1 t", "--max-new-tokens=3", "--mesh=data=-1")
  assert run.returncode == 0, run.stderr
  run = in_process("export", "runs/p", "exported")
  assert run.returncode == 0, run.stderr
  assert json.loads((tmp_path / "exported/config.json").read_text())["vocab_size"] == 259


BAD_INPUTS = {
  "typo": (["train", "--training.num_step=5"], 2, "did you mean --training.num-steps"),
  "short typo": (["train", "--steps=5"], 2, "did you mean --training.num-steps"),
  "wrong type": (["train", "--training.num_steps=ten"], 2, "expected a whole number"),
  "range": (["train", "--model.dropout=1.5"], 2, "from 0 to 0.999"),
  "heads": (["train", "--model.num_kv_heads=3"], 2, "1, 2, 4"),
  "seq_len": (["train", "--data.seq_len=512"], 2, "--model.context=512"),
  "unknown config": (["train", "stdlib_tinny"], 2, "did you mean stdlib_tiny"),
  "mesh axis": (["train", "--mesh=foo=2"], 2, "data, fsdp, context"),
  "mesh size": (["train", "--mesh=data=2,fsdp=2"], 2, "1 present"),
  "attention": (["train", "--training.attention=cudnn"], 2, "on NVIDIA GPUs"),
  "attention on TPUs": (["train", "--training.attention=splash"], 2, "it runs on TPUs"),
  "idle devices": (["train", "--mesh=data=2", "--simulated_devices=8"], 2, "8 present"),
  "batch": (["train", "--data.batch_size=15"], 2, "nearest: 16"),
  "no files": (["train", "--data.corpus=files:nowhere/*.txt"], 3, "no documents matched"),
  "unknown corpus": (["train", "--data.corpus=stdlibs"], 2, "did you mean stdlib"),
  "unknown tfds": (["train", "--data.corpus=tfds:no_such_set"], 3, "no_such_set"),
  "no tokenizer": (["train", "--tokenizer.path=nowhere.json"], 3, "nowhere.json"),
  "must resume": (["train", "--checkpoint.resume=must"], 4, "no checkpoint"),
  "no run": (["infer", "--prompt=a"], 4, "no trained run"),
  "unknown run": (["infer", "nope", "--prompt=a"], 4, "not a run directory"),
  "no prompt": (["infer"], 2, "--prompt"),
  "temperature": (["infer", "--prompt=a", "--temperature=-1"], 2, "0 is greedy"),
  "top-p": (["infer", "--prompt=a", "--top-p=0"], 2, "above 0"),
  "top-k": (["infer", "--prompt=a", "--top-k=0"], 2, "at least 1"),
  "samples": (["infer", "--prompt=a", "--num-samples=0"], 2, "at least 1"),
  "prompt file": (["infer", "--prompt-file=nowhere"], 2, "cannot be read"),
  "job": (["infer", "--prompt-file=in.jsonl"], 2, "--output out.jsonl"),
  "logit bias": (["infer", "--prompt=a", "--logit-bias=7"], 2, "50256=-5"),
  "unknown flag": (["infer", "--prompt=a", "--tempreture=1"], 2, "--tempreture"),
  "unknown command": (["trian"], 2, "train"),
  "no command": ([], 2, "COMMAND"),
  "no tasks": (["eval", "nope", "--tasks=nowhere.jsonl"], 2, "cannot be read"),
  "a folder of tasks": (["eval", "nope", "--tasks=."], 2, "cannot be read"),
  "a bad task": (["eval", "nope", "--tasks=/dev/null"], 2, "/dev/null has no tasks"),
  "tasks and bleu": (["eval", "nope", "--tasks=x", "--bleu"], 2, "--tasks with --bleu"),
  "tasks of a split": (["eval", "--tasks=x", "--split=train"], 2, "--tasks with --split"),
  "ckpt": (["ckpt", "verify", "nope"], 4, "not a run directory"),
}


# One of each exit code, and those that need other devices than this process has: as a user
# starts them. The others run in this process, as a start takes two seconds.
IN_PROCESSES = ("typo", "mesh size", "no run")


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(flaxlm, in_process, tmp_path, name):
  """One line of cause, one of cure, the right exit code, no traceback, nothing compiled."""
  arguments, exit_code, text = BAD_INPUTS[name]
  run = (flaxlm if name in IN_PROCESSES else in_process)(*arguments)
  assert run.returncode == exit_code, run.stderr
  assert text in run.stderr
  assert "Traceback" not in run.stderr
  assert not run.stdout
  message = [line for line in run.stderr.splitlines() if line.startswith("flaxlm: ")]
  assert len(message) == 1 and len(run.stderr.splitlines()) <= 2
  assert not list(tmp_path.glob("runs/*/checkpoints/*")), "nothing was trained"


def test_help_names_every_knob(in_process):
  run = in_process("train", "--help")
  assert run.returncode == 0
  for knob in ("--model.num-kv-heads", "--optimizer.schedule", "--mesh", "cosine|linear"):
    assert knob in run.stdout


@pytest.mark.parametrize(
  "command", [["train"], ["plan"], ["shard"], ["verify"], ["launch"], ["look", "positions"]]
)
def test_help_says_that_a_config_is_executed(in_process, command):
  assert "flaxlm executes it" in " ".join(in_process(*command, "--help").stdout.split())
  assert "flaxlm executes it" in (ROOT / "README.md").read_text()


def test_doors_are_the_commands(tmp_path, flaxlm):
  """train.py and infer.py say what `flaxlm train` and `flaxlm infer` say."""
  for door in ("train", "infer"):
    run = subprocess.run(
      [sys.executable, ROOT / f"{door}.py", "--help"],
      env=os.environ | flaxlm.environment,
      capture_output=True,
      text=True,
      check=True,
    )
    assert run.stdout.splitlines()[1:] == flaxlm(door, "--help").stdout.splitlines()[1:]


@pytest.mark.slow
def test_an_rnn_is_trained_and_continues(in_process, corpus, tmp_path):
  run = in_process(
    "train", "rnn_lstm", *tiny(corpus, training__num_steps=3, model__cell="gru")
  )
  assert run.returncode == 0, run.stderr
  run = in_process("infer", "--prompt", "3 t", "--max-new-tokens=4", "--beams=2", "--json")
  assert run.returncode == 0, run.stderr
  assert json.loads(run.stdout)["prompt"] == "3 t"


@pytest.mark.slow
def test_an_encoder_fills_and_embeds(in_process, corpus, tmp_path):
  run = in_process(
    "train", "bert_tiny", *tiny(corpus, training__num_steps=3, data__batch_size=8)
  )
  assert run.returncode == 0, run.stderr
  (record,) = [m for m in metrics(tmp_path, "bert_tiny") if "eval/loss" in m]
  assert 0 <= record["eval/accuracy"] <= 1
  assert "eval/bits_per_byte" not in record, "it has seen the text around the masks"
  run = in_process("infer", "--fill", "3 times [MASK] is", "--json")
  assert run.returncode == 0, run.stderr
  filled = json.loads(run.stdout)
  assert filled["text"] == "3 times [MASK] is"
  assert filled["filled"].startswith("3 times")
  (candidates,) = filled["candidates"]
  assert len(candidates) == 5
  run = in_process("embed", "--text", "3 times", "--text", "4", "--normalise", "--json")
  assert run.returncode == 0, run.stderr
  first, second = (json.loads(line) for line in run.stdout.splitlines())
  assert (first["text"], second["text"]) == ("3 times", "4")
  assert len(first["embedding"]) == 16
  assert sum(x * x for x in first["embedding"]) == pytest.approx(1, rel=1e-4)
  for arguments, text in (
    (["infer", "--fill", "no mask"], "has no [MASK]"),
    (["infer", "--prompt", "a"], "does not continue"),
    (["eval", "--bleu"], "does not translate"),
  ):
    run = in_process(*arguments)
    assert run.returncode == 2
    assert text in run.stderr


@pytest.mark.slow
def test_an_encoder_decoder_translates(in_process, tmp_path):
  run = in_process(
    "train",
    "transformer_2017",
    *tiny("gettext:de", training__num_steps=3, model__context=64),
  )
  assert run.returncode == 0, run.stderr
  assert "eval/bits_per_byte" in metrics(tmp_path, "transformer_2017")[-1]
  run = in_process("infer", "--prompt", "Save", "--max-new-tokens=6", "--beams=3", "--json")
  assert run.returncode == 0, run.stderr
  found = json.loads(run.stdout)
  assert found["prompt"] == "Save"
  assert 1 <= len(found["tokens"]) <= 6
  plain = in_process("infer", "--prompt", "Save", "--max-new-tokens=6", "--temperature=0")
  assert plain.returncode == 0, plain.stderr
  for named, split in ((), "validation"), (("--corpus=gettext:de",), "whole"):
    run = in_process("eval", "--bleu", "--pairs=2", "--beams=1", "--json", *named)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["corpus"], found["split"], found["pairs"]) == ("gettext:de", split, 2)
