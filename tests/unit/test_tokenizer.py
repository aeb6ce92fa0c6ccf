"""Text -> ids: plain text only, and what identifies a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eulerforge.errors import TokenizerError
from eulerforge.models.tokenizer import Tokenizer, load_tokenizer
from tests.kit.tokenizers import EOS, byte_ids, write_byte_tokenizer


def _load(path: Path, add_bos: bool = False, add_eos: bool = True) -> Tokenizer:
    return load_tokenizer(str(path), trust_remote_code=False, add_bos=add_bos, add_eos=add_eos)


def _edit(path: Path, **values: Any) -> Path:
    """Change top-level keys of tokenizer.json."""
    file = path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


@pytest.mark.parametrize("text", ["a <eos> b", "<eos>", "<eos><eos>", "é<bos>\U0001f600", "", " ", "\n\ttext"])
def test_a_document_is_plain_text_whatever_it_spells(tmp_path: Path, text: str) -> None:
    tokenizer = _load(write_byte_tokenizer(tmp_path / "t", bos=True))
    assert tokenizer.encode([text]) == [byte_ids(text)]


def test_a_post_processor_adds_nothing(tmp_path: Path) -> None:
    tokenizer = _load(write_byte_tokenizer(tmp_path / "t", bos=True, bos_by_itself=True), add_bos=True)
    assert tokenizer.backend("ab")["input_ids"] == [257, *b"ab"]  # the trap is set
    assert tokenizer.encode(["ab", "c"]) == [[*b"ab"], [*b"c"]]
    assert (tokenizer.eos_id, tokenizer.bos_id) == (EOS, 257)


@pytest.mark.parametrize(
    "limits",
    [
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
    ],
    ids=["truncation", "padding"],
)
def test_limits_stored_in_the_file_are_not_used_and_do_not_change_the_fingerprint(
    tmp_path: Path, limits: dict[str, Any]
) -> None:
    """The fingerprint is taken before encoding (a reused cache) or after it (a built one); both must agree."""
    tokenizer = _load(_edit(write_byte_tokenizer(tmp_path / "t"), **limits))
    before = tokenizer.fingerprint
    assert tokenizer.encode(["abcdef", "g"]) == [[*b"abcdef"], [*b"g"]]
    assert tokenizer.fingerprint == before


def test_encoding_is_not_cut_at_the_model_length(tmp_path: Path) -> None:
    path = write_byte_tokenizer(tmp_path / "t")
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 4}))
    assert _load(path).encode(["abcdefgh"]) == [[*b"abcdefgh"]]


@pytest.mark.parametrize(("extra", "expected"), [(0, 257), (2, 259)])
def test_vocab_size_counts_added_tokens(tmp_path: Path, extra: int, expected: int) -> None:
    tokenizer = _load(write_byte_tokenizer(tmp_path / "t", extra=extra))
    assert tokenizer.backend.vocab_size == 256  # what a naive comparison would use
    assert tokenizer.vocab_size == expected
    assert tokenizer.largest_id == expected - 1


def test_vocab_size_covers_ids_above_a_hole(tmp_path: Path) -> None:
    path = write_byte_tokenizer(tmp_path / "t")
    core = json.loads((path / "tokenizer.json").read_text())
    core["model"]["vocab"]["zz"] = 400
    tokenizer = _load(_edit(path, model=core["model"]))
    assert len(tokenizer.backend) == 258
    assert tokenizer.vocab_size == 401


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first = write_byte_tokenizer(tmp_path / "one")
    second = shutil.copytree(first, tmp_path / "elsewhere" / "two")
    base = _load(first).fingerprint
    assert _load(second).fingerprint == base
    assert len(base) == 64
    others = {
        _load(write_byte_tokenizer(tmp_path / "extra", extra=1)).fingerprint,
        _load(write_byte_tokenizer(tmp_path / "bos", bos=True)).fingerprint,
        _load(_edit(second, normalizer={"type": "Lowercase"})).fingerprint,
    }
    assert len(others | {base}) == 4


@pytest.mark.parametrize(("eos", "bos"), [(True, False), (False, True), (False, False)])
def test_tokens_that_the_policy_needs_must_exist(tmp_path: Path, eos: bool, bos: bool) -> None:
    path = write_byte_tokenizer(tmp_path / "t", eos=eos, bos=bos)
    for kind, present in (("eos", eos), ("bos", bos)):
        policy = {"add_eos": kind == "eos", "add_bos": kind == "bos"}
        if present:
            assert _load(path, **policy).vocab_size == 256 + eos + bos
            continue
        with pytest.raises(TokenizerError) as caught:
            _load(path, **policy)
        assert str(caught.value) == f"tokenizer: {path} has no {kind.upper()} token, but data.add_{kind} is true"
        assert f'"{kind}_token"' in caught.value.problems[0].fix
    assert _load(path, add_eos=False).encode(["a"]) == [[97]]


@pytest.mark.parametrize(("eos", "expected"), [(True, EOS), (False, 0)])
def test_padding_uses_a_valid_id(tmp_path: Path, eos: bool, expected: int) -> None:
    assert _load(write_byte_tokenizer(tmp_path / "t", eos=eos), add_eos=False).pad_id == expected


@pytest.mark.parametrize(("content", "place"), [(None, "as hub name"), ("{", "tokenizer.json")])
def test_a_tokenizer_that_does_not_load_is_one_line(tmp_path: Path, content: str | None, place: str) -> None:
    path = tmp_path / "none"
    if content is not None:
        path.mkdir()
        (path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError) as caught:
        _load(path)
    assert str(caught.value).startswith(f"tokenizer: cannot load {path} ({place}): ")
    assert "\n" not in str(caught.value)
