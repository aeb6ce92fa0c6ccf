"""The corpus and the tokenizer of `eulerforge quickstart`."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from eulerforge.quickstart import train_tokenizer, write_corpus

REPOSITORY = Path(__file__).resolve().parents[2]


def names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(path, the number that write_corpus returned). The directory is one that it has to make."""
    path = tmp_path_factory.mktemp("corpus") / "made" / "corpus.jsonl"
    return path, write_corpus(path)


@pytest.fixture(scope="module")
def documents(corpus):
    return [json.loads(line) for line in corpus[0].read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def small_corpus(corpus, tmp_path_factory):
    """A tenth of the documents, to train on in little time."""
    path = tmp_path_factory.mktemp("small") / "corpus.jsonl"
    lines = corpus[0].read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[::10]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer_dir(small_corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "made" / "here"
    train_tokenizer(small_corpus, directory, 600)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


def test_corpus_is_the_same_each_time(corpus, tmp_path):
    again = tmp_path / "corpus.jsonl"
    again.write_text("an older file")
    assert write_corpus(again) == corpus[1]
    assert again.read_bytes() == corpus[0].read_bytes()
    assert names_in(tmp_path) == ["corpus.jsonl"]


def test_corpus_documents(corpus, documents):
    assert len(documents) == corpus[1] > 300
    assert all(document.keys() == {"text", "source"} for document in documents)
    sources = [document["source"] for document in documents]
    assert len(set(sources)) == len(sources)
    assert not any("test" in source.split("/") or "site-packages" in source for source in sources)
    assert sum(len(document["text"]) for document in documents) > 1_000_000


def test_corpus_has_modules_and_topics(documents):
    texts = {document["source"]: document["text"] for document in documents}
    assert texts["argparse.py"].startswith("Command-line parsing library")
    assert "\n\n\nHelpFormatter\n\n" in texts["argparse.py"]
    assert "\n\n\nJSONEncoder.default\n\n" in texts["json/encoder.py"]
    assert "lambda" in texts["pydoc_data.topics/lambda"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def fail_midway():
        yield "one", "text"
        raise OSError("disk gone")

    monkeypatch.setattr("eulerforge.quickstart._documents", fail_midway)
    path = tmp_path / "corpus.jsonl"
    path.write_text("old")
    with pytest.raises(OSError, match="disk gone"):
        write_corpus(path)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["corpus.jsonl"]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x ** 2  # squared\n",
        "Leonhard Euler — e^{iπ} + 1 = 0",
        "오일러의 수 ∞ 🙂 \t  two  spaces .  ,",
        " leading and trailing ",
        "",
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_special_token(tokenizer):
    assert len(tokenizer) == 600
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.encode("a<|endoftext|>").count(0) == 1
    assert 0 not in tokenizer.encode("plain text")
    assert tokenizer.model_max_length > 10**9


def test_tokenizer_is_the_same_each_time(small_corpus, tokenizer_dir, tmp_path):
    output = tmp_path / "tokenizer"
    output.mkdir()  # an empty directory is no hindrance
    train_tokenizer(small_corpus, output, 600)
    assert names_in(output) == names_in(tokenizer_dir)
    for name in names_in(output):
        assert (output / name).read_bytes() == (tokenizer_dir / name).read_bytes()
    assert names_in(tmp_path) == ["tokenizer"]


def test_tokenizer_does_not_replace_files(small_corpus, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        train_tokenizer(small_corpus, tmp_path, 600)
    assert names_in(tmp_path) == ["precious"]


def test_tokenizer_needs_room_for_all_bytes(small_corpus, tmp_path):
    with pytest.raises(ValueError, match="257 entries"):
        train_tokenizer(small_corpus, tmp_path / "tokenizer", 256)


def test_import_is_light():
    code = "import sys, eulerforge.quickstart; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
