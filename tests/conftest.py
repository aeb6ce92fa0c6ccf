"""Settings and fixtures that all tests share. No test may reach a model hub, and none writes outside its tmp_path."""

from __future__ import annotations

import os
import tempfile

# Before anything imports transformers: no network, and copies of custom code not in the user's own cache.
_MODULES = tempfile.TemporaryDirectory(prefix="eulerforge-modules-")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "HF_MODULES_CACHE": _MODULES.name}

from pathlib import Path

import pytest

from tests.kit.commands import Workspace
from tests.kit.tokenizers import write_byte_tokenizer


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token caches and copies of remote code go to a folder of the test's own."""
    home = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty working directory, with helpers that write inputs and run the command line there."""
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one id per byte and `<eos>` as id 256."""
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")
