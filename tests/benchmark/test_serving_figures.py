# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/serving.py counts and compares, with a small server for its client."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from benchmarks.serving import (
  ANSWERS,
  OURS,
  PROMPTS,
  Answer,
  Question,
  Round,
  Server,
  ask_all,
  end,
  make_questions,
  results_of,
  same_answers,
  text_of,
)
from flaxlm.errors import FlaxLMError

QUESTIONS = [Question("a b", 3), Question("c", 2), Question("d", 4)]


def round_of(seconds: float, texts: Sequence[str], processor: float = 1.0) -> Round:
  return Round(seconds, processor, [Answer(text, 0.1 * n) for n, text in enumerate(texts)])


def test_questions_are_within_bounds_and_follow_the_seed():
  questions = make_questions(50, (8, 1))
  assert questions == make_questions(50, (8, 1)) != make_questions(50, (8, 2))
  assert all(PROMPTS[0] <= len(one.prompt) + 1 <= PROMPTS[1] for one in questions)
  assert all(ANSWERS[0] <= one.num_new <= ANSWERS[1] for one in questions)


@pytest.mark.parametrize(
  ("line", "text"),
  [
    (b'data: {"choices": [{"text": "ab"}]}\n', "ab"),
    (b'data: {"choices": [{"text": null}]}\n', ""),
    (b'data: {"choices": [], "usage": {}}\n', ""),
    (b"data: [DONE]\n", ""),
    (b"2f\r\n", ""),
    (b"\r\n", ""),
  ],
)
def test_texts_of_lines(line: bytes, text: str):
  assert text_of(line) == text


def test_errors_in_a_stream_are_told():
  with pytest.raises(FlaxLMError, match="is full"):
    text_of(b'data: {"error": {"message": "it is full"}}\n')


def answered(questions: Sequence[Question], texts: Sequence[str]) -> list[Answer]:
  """What the client gets from a server with these texts, a token at a time."""

  async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    (size,) = [line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
    prompt = json.loads(await reader.readexactly(int(size.split(b":")[1])))["prompt"]
    (number,) = [n for n, one in enumerate(questions) if one.prompt == prompt]
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for letter in texts[number]:
      writer.write(b'data: {"choices": [{"text": "%s"}]}\n\n' % letter.encode())
    writer.write(b"data: [DONE]\n\n")
    await writer.drain()
    writer.close()

  async def run() -> list[Answer]:
    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listening:
      port = listening.sockets[0].getsockname()[1]
      server = Server("it", None, port, "model")  # type: ignore[arg-type]
      return await ask_all(server, questions, streams=2)

  return asyncio.run(run())


def test_answers_come_in_the_order_of_the_questions():
  found = answered(QUESTIONS, ["xyz", "uv", "abcd"])
  assert [answer.text for answer in found] == ["xyz", "uv", "abcd"]
  assert all(answer.first > 0 for answer in found)


def test_a_missing_token_is_told():
  with pytest.raises(FlaxLMError, match="1 tokens of 2"):
    answered(QUESTIONS, ["xyz", "u", "abcd"])


def test_answers_that_part_are_told():
  ours = [round_of(1.0, ["abcd", "efgh"])]
  assert "2 of 2 answers are the same, 100.0%" in same_answers(ours, ours)
  told = same_answers(ours, [round_of(1.0, ["abcd", "efxh"])])
  assert "1 of 2 answers are the same, 75.0%" in told
  with pytest.raises(FlaxLMError, match="different answers"):
    same_answers(ours, [round_of(1.0, ["xbcd", "xfgh"])])


def test_ratios_are_of_the_same_round():
  texts = ["abcd", "efgh"]
  ours = [round_of(1.0, texts, 2.0), round_of(2.0, texts, 4.0)]
  theirs = [round_of(3.0, texts, 1.0), round_of(6.0, texts, 2.0)]
  found = results_of("2 streams", {OURS: ours, "peer": theirs}, [8, 8])
  results = {result.case: result for result in found}
  assert len(results) == len(found)
  speed = results["2 streams vs peer"]
  assert (speed.median, speed.low, speed.high) == (6.0, 4.0, 8.0)
  assert speed.ratio == speed.ratio_low == speed.ratio_high == 3.0
  assert results["2 streams vs peer, processor time"].ratio == 0.5
  assert results["2 streams, peer"].high == pytest.approx(8 / 3)
  assert results["2 streams, peer, first token, max"].median == pytest.approx(100.0)


def test_processor_time_and_the_end_of_a_server():
  program = "sum(range(10**7)); print(flush=True); input()"
  pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  process = subprocess.Popen([sys.executable, "-c", program], **pipes)
  try:
    assert process.stdout is not None and process.stdout.readline()
    assert Server("it", process, 0, "model").processor > 0
  finally:
    end(process)
    for pipe in (process.stdin, process.stdout):
      pipe.close()
  with pytest.raises(ProcessLookupError):
    os.kill(process.pid, 0)
