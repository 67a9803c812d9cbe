# SPDX-License-Identifier: Apache-2.0
"""The model for lm-evaluation-harness where that is not installed: one line says so."""

import importlib
import sys

import pytest

from flaxlm.errors import ConfigError


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
  monkeypatch.delitem(sys.modules, "flaxlm.interop.harness", raising=False)
  with pytest.raises(ConfigError, match="not installed") as e:
    importlib.import_module("flaxlm.interop.harness")
  assert e.value.cure == "pip install 'flaxlm[lm-eval]'"
