# SPDX-License-Identifier: Apache-2.0
"""The chat page in a browser: it shows what is written, and asks no other host."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, with_chromium
from serving_runs import is_free, listening, random_run, served

from flaxlm.serving.app import build_app

pytestmark = [
  pytest.mark.slow,
  with_chromium,
]


class Browser:
  """A page of a browser that is told what to do over two pipes (Chrome's DevTools)."""

  def __init__(self, to_it: Any, from_it: Any):
    self.to_it, self.from_it, self.number, self.rest = to_it, from_it, 0, b""
    self.events: list[dict] = []
    self.session: str | None = None
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self.session = attached["sessionId"]
    for part in ("Page", "Runtime", "Network", "Log"):
      self.call(f"{part}.enable")

  def call(self, method: str, **params: Any) -> dict:
    self.number += 1
    message = {"id": self.number, "method": method, "params": params}
    if self.session:
      message["sessionId"] = self.session
    self.to_it.write(json.dumps(message).encode() + b"\0")
    self.to_it.flush()
    while True:
      found = self.receive()
      if found.get("id") == self.number:
        assert "error" not in found, found
        return found["result"]
      self.events.append(found)

  def receive(self) -> dict:
    while b"\0" not in self.rest:
      data = os.read(self.from_it.fileno(), 65536)
      assert data, "the browser has ended"
      self.rest += data
    message, _, self.rest = self.rest.partition(b"\0")
    return json.loads(message)

  def value(self, expression: str) -> Any:
    """What a script of the page's own world has as its value."""
    found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  def wait_for(self, expression: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      if found := self.value(expression):
        return found
      time.sleep(0.05)
    raise AssertionError(f"{expression}: {self.value('document.body.innerText')}")

  def of(self, method: str) -> list[dict]:
    return [event["params"] for event in self.events if event.get("method") == method]


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
  # Chromium reads from descriptor 3 and writes to 4.
  (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
  flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
  words = f'exec 3<&{in_read} 4>&{out_write}; exec "$0" "$@"'
  child = subprocess.Popen(
    ["bash", "-c", words, str(CHROMIUM), *flags],
    pass_fds=(in_read, out_write),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(in_read)
  os.close(out_write)
  try:
    with os.fdopen(in_write, "wb") as to_it, os.fdopen(out_read, "rb") as from_it:
      browser = Browser(to_it, from_it)
      yield browser
      browser.session = None
      browser.call("Browser.close")
  finally:
    child.kill()
    child.wait()


TURNS = "[...document.querySelectorAll('.turn')].map(x => [x.className, x.textContent])"


def test_a_conversation(tmp_path: Path):
  run = random_run(tmp_path / "letters", eos_logit=-2.0)
  with served(run) as service, listening(build_app(service)) as url:
    with browsing(tmp_path / "profile") as page:
      page.call("Page.navigate", url=f"{url}/")
      page.wait_for("document.title === 'letters'")
      page.value("document.getElementById('tokens').value = 30")
      for number, text in enumerate(("ab", "<b>bold</b>"), 1):
        page.value(f"document.getElementById('text').value = {json.dumps(text)}")
        page.value("document.getElementById('send').click()")
        page.wait_for(f"{TURNS}.length === {2 * number}")
        page.wait_for("!document.getElementById('send').disabled")
      turns = page.value(TURNS)
      kinds = [kind for kind, _ in turns]
      assert kinds == ["turn user", "turn assistant"] * 2
      assert turns[2][1] == "<b>bold</b>"  # as text
      assert page.value("document.querySelectorAll('b').length") == 0
      # Too long for the model: the server says so, and the page shows it.
      page.value("document.getElementById('text').value = 'a'.repeat(200)")
      page.value("document.getElementById('send').click()")
      error = page.wait_for("(document.querySelector('.turn.error') || {}).textContent")
      assert "model.context=160" in error
      page.value("document.getElementById('clear').click()")
      assert page.value(TURNS) == []
      urls = [event["request"]["url"] for event in page.of("Network.requestWillBeSent")]
      faults = page.of("Runtime.exceptionThrown")
      logged = [event["entry"]["text"] for event in page.of("Log.entryAdded")]
    assert is_free(service)
  assert len(urls) >= 6
  assert all(one.startswith((f"{url}/", "data:")) for one in urls)
  assert not faults
  assert not [text for text in logged if "Content Security" in text or "violat" in text]


def test_an_answer_can_be_stopped(tmp_path: Path):
  run = random_run(tmp_path / "letters", eos_logit=-30.0, context=4096)
  with served(run) as service, listening(build_app(service)) as url:
    with browsing(tmp_path / "profile") as page:
      page.call("Page.navigate", url=f"{url}/")
      page.wait_for("document.title === 'letters'")
      page.value("document.getElementById('tokens').value = 64")
      page.value("document.getElementById('text').value = 'a'")
      page.value("document.getElementById('send').click()")
      page.wait_for("!document.getElementById('stop').disabled")
      page.value("document.getElementById('stop').click()")
      page.wait_for("!document.getElementById('send').disabled")
      assert page.value("document.querySelectorAll('.error').length") == 0
    assert is_free(service)
