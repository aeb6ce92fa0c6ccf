"""Directory -> model: seeded initialisation, weights of every form, buffers, vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from eulerforge.errors import ModelError
from eulerforge.models.build import BuiltModel, build_model, embedding_rows, grow_vocabulary, is_tied
from eulerforge.models.directory import ModelDirectory
from tests.kit.commands import Workspace
from tests.kit.models import VOCAB, write_custom, write_llama, write_mixtral

Writer = Callable[..., Path]


def _build(path: Path, seed: int = 42) -> BuiltModel:
    return build_model(ModelDirectory.read(path), trust_remote_code=True, seed=seed)


def _fresh(path: Path, seed: int = 1) -> Any:
    """The directory's model by transformers alone."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model")
    first, again, other = (_build(path, seed).model.state_dict() for seed in (5, 5, 6))
    assert _same(first, again)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert _build(path, 5).origin == "initialised from seed 5"
    assert _same(first, _fresh(path, seed=5).state_dict())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_are_float32_whatever_the_config_says(tmp_path: Path, dtype: str) -> None:
    model = _build(write_llama(tmp_path / "model", dtype=dtype)).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_parameter_that_the_code_makes_in_another_type_becomes_float32(tmp_path: Path) -> None:
    path = write_custom(tmp_path / "mixed_types", "probe")
    modeling = (path / "modeling_kit.py").read_text()
    made = "        self.gate = nn.Parameter(torch.full((2,), 0.3, dtype=torch.bfloat16))\n        self.post_init()\n"
    (path / "modeling_kit.py").write_text(modeling.replace("        self.post_init()\n", made))
    gate = _build(path).model.gate
    assert gate.dtype == torch.float32
    assert gate.tolist() == [torch.tensor(0.3, dtype=torch.bfloat16).item()] * 2


def _save(model: Any, path: Path, form: str, dtype: torch.dtype = torch.float32) -> None:
    """Write the model's weights into a directory in one of the forms that are met."""
    state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(state)
    if form == "safetensors":
        save_file(state, path / "model.safetensors")
    elif form == "sharded safetensors":
        for shard in (0, 1):
            save_file({name: state[name] for name in names[shard::2]}, path / f"model-{shard}.safetensors")
        weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif form == "bin":
        torch.save(state, path / "pytorch_model.bin")
    elif form == "old bin":
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form == "sharded bin":
        for shard in (0, 1):
            torch.save({name: state[name] for name in names[shard::2]}, path / f"part-{shard}.bin")
        weight_map = {name: f"part-{index % 2}.bin" for index, name in enumerate(names)}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


FORMS = {
    "safetensors": "model.safetensors",
    "sharded safetensors": "model.safetensors.index.json",
    "bin": "pytorch_model.bin",
    "old bin": "pytorch_model.bin",
    "sharded bin": "pytorch_model.bin.index.json",
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_loaded_from_every_form(tmp_path: Path, form: str) -> None:
    path = write_llama(tmp_path / "model")
    source = _fresh(path)
    _save(source, path, form)
    built = _build(path)
    assert built.origin == FORMS[form]
    assert _same(built.model.state_dict(), source.state_dict())


def test_half_precision_weights_become_float32_exactly(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model")
    source = _fresh(path)
    _save(source, path, "safetensors", torch.bfloat16)
    state = _build(path).model.state_dict()
    assert _same(state, {name: tensor.bfloat16().float() for name, tensor in source.state_dict().items()})


def test_what_transformers_saves_is_loaded(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model")
    source = _fresh(path)
    source.save_pretrained(path, max_shard_size="5KB")
    assert (path / "model.safetensors.index.json").is_file()
    assert _same(_build(path).model.state_dict(), source.state_dict())


@pytest.mark.parametrize("saved", [False, True], ids=["fresh", "with weights"])
@pytest.mark.parametrize("kind", ["llama", "custom"])
def test_tied_stays_tied(tmp_path: Path, kind: str, saved: bool) -> None:
    """transformers stores a tied weight once, so the head is neither missing nor left at its initial values."""
    if kind == "llama":
        path = write_llama(tmp_path / "tied_llama", tie_word_embeddings=True)
    else:
        path = write_custom(tmp_path / "tied_custom", "buffers", tie_word_embeddings=True)
    expected = None
    if saved:
        source = _fresh(path)
        assert is_tied(source)
        source.save_pretrained(path)
        assert len(load_file(path / "model.safetensors").keys() & {"lm_head.weight", "head.weight"}) == 0
        expected = source.get_input_embeddings().weight.detach().clone()
    model = _build(path).model
    assert is_tied(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert expected is None or torch.equal(model.get_output_embeddings().weight, expected)


def test_untied_is_not_tied(tmp_path: Path) -> None:
    assert not is_tied(_build(write_llama(tmp_path / "model")).model)


def test_weights_under_converted_names_are_loaded(tmp_path: Path) -> None:
    """transformers fuses Mixtral's experts in memory and stores them apart; buffers stay those of a fresh model."""
    path = write_mixtral(tmp_path / "model", rope_theta=50.0)
    source = _fresh(path)
    source.save_pretrained(path)
    stored = load_file(path / "model.safetensors")
    assert set(stored) - set(source.state_dict())  # other names in the file, or this test shows nothing
    model = _build(path).model
    assert _same(model.state_dict(), source.state_dict())
    buffers, expected = dict(model.named_buffers()), dict(source.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)
    frequencies = 1.0 / 50.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(buffers["model.rotary_emb.inv_freq"], frequencies)


@pytest.mark.parametrize("saved", [False, True], ids=["fresh", "with weights"])
def test_buffers_that_are_not_stored_equal_their_formula(tmp_path: Path, saved: bool) -> None:
    """transformers' from_pretrained leaves them as noise."""
    path = write_custom(tmp_path / f"buffers_{saved}", "buffers")
    if saved:
        source = _fresh(path)
        source.steps += 7
        source.save_pretrained(path)
    model = _build(path).model
    assert torch.equal(model.table, torch.exp(-torch.arange(16) / 8.0))
    assert torch.equal(model.offsets, torch.arange(16) / 16)
    assert model.steps.item() == (7 if saved else 0)
    assert model.steps.dtype == torch.int64
    assert "table" not in model.state_dict()


def _edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path / "model.safetensors")
    edit(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["llama", "custom"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "renamed", "all three"])
def test_weights_that_do_not_fit_are_listed(tmp_path: Path, kind: str, fault: str) -> None:
    if kind == "llama":
        path, name = write_llama(tmp_path / "misfit_llama"), "model.norm.weight"
    else:
        path, name = write_custom(tmp_path / "misfit_custom", "probe"), "head.weight"
    other = "model.embed_tokens.weight" if kind == "llama" else "embed.weight"
    _save(_fresh(path), path, "safetensors")

    def edit(state: dict[str, torch.Tensor]) -> None:
        if fault in ("missing", "renamed", "all three"):
            del state[name]
        if fault in ("unexpected", "renamed", "all three"):
            state["zzz.weight"] = torch.zeros(2)
        if fault in ("shape", "all three"):
            state[other] = torch.zeros(3, 16)

    _edit_weights(path, edit)
    missing, unexpected = f"1 missing: {name}", "1 unexpected: zzz.weight"
    shape = f"1 of another shape: {other} [3, 16] in the file, [{VOCAB}, 16] in the model"
    expected = {
        "missing": [missing],
        "unexpected": [unexpected],
        "shape": [shape],
        "renamed": [missing, unexpected],
        "all three": [missing, unexpected, shape],
    }[fault]
    with pytest.raises(ModelError) as caught:
        _build(path)
    assert str(caught.value) == (
        f"{path / 'model.safetensors'}: the weights do not fit config.json: {'; '.join(expected)}"
    )


def test_long_lists_are_shown_in_part(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model")
    _save(_fresh(path), path, "safetensors")
    _edit_weights(path, lambda state: state.update({f"z{index}": torch.zeros(1) for index in range(9)}))
    with pytest.raises(ModelError, match=r"9 unexpected: z0, z1, z2, z3, \.\.\.$"):
        _build(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "model.safetensors: cannot be read: "),
        ("empty", "model.safetensors: cannot be read: "),
        ("shard", "model.safetensors.index.json names {path}/none.safetensors, which does not exist"),
        ("index", "model.safetensors.index.json: not a valid weight index: "),
        ("index shape", "model.safetensors.index.json: not a valid weight index: "),
        ("pickle", "pytorch_model.bin: cannot be read: "),
        ("text", "pytorch_model.bin: cannot be read: "),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, damage: str, message: str) -> None:
    path = write_llama(tmp_path / "model")
    file = path / "model.safetensors"
    if damage == "cut":
        _save(_fresh(path), path, "safetensors")
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "shard":
        (path / f"{file.name}.index.json").write_text('{"weight_map": {"a": "none.safetensors"}}')
    elif damage == "index":
        (path / f"{file.name}.index.json").write_text("{")
    elif damage == "index shape":
        (path / f"{file.name}.index.json").write_text('{"weight_map": ["a"]}')
    elif damage == "pickle":
        torch.save({"a": Path("x")}, path / "pytorch_model.bin")  # needs pickled code, which is never run
    else:
        (path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=re.escape(message.format(path=path))):
        _build(path)


def test_code_that_fails_is_told_with_its_place(tmp_path: Path) -> None:
    path = write_custom(tmp_path / "raises", "probe")
    modeling = (path / "modeling_kit.py").read_text()
    (path / "modeling_kit.py").write_text(
        modeling.replace("        self.post_init()\n", "        raise KeyError('layer_width')\n")
    )
    with pytest.raises(ModelError) as caught:
        _build(path)
    assert "cannot build the model: KeyError: 'layer_width' (modeling_kit.py:" in str(caught.value)
    assert str(caught.value).endswith(" in __init__)")


def test_an_unknown_architecture_is_told(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model", model_type="no_such_architecture")
    with pytest.raises(ModelError, match=r"cannot read the configuration: .*no_such_architecture"):
        _build(path)


# --- vocabulary ---

GROWABLE: dict[str, tuple[Writer, dict[str, Any], bool]] = {
    "llama": (write_llama, {}, False),
    "tied llama": (write_llama, {"tie_word_embeddings": True}, True),
    "custom": (lambda path, **config: write_custom(path, "probe", **config), {}, False),
    "tied custom": (
        lambda path, **config: write_custom(path, "buffers", **config),
        {"tie_word_embeddings": True},
        True,
    ),
}


@pytest.mark.parametrize("kind", GROWABLE)
def test_growing_keeps_old_rows_and_ties(tmp_path: Path, kind: str) -> None:
    writer, options, tied = GROWABLE[kind]
    model = _build(writer(tmp_path / f"grow_{kind.replace(' ', '_')}", **options)).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert is_tied(model) is tied
    assert embedding_rows(model) == VOCAB
    torch.manual_seed(3)
    grow_vocabulary(model, VOCAB + 5)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, old in before.items():
        grown = old.ndim == 2 and old.shape[0] == VOCAB
        assert after[name].shape[0] == VOCAB + 5 if grown else after[name].shape == old.shape
        assert torch.equal(after[name][:VOCAB] if grown else after[name], old)
    assert embedding_rows(model) == model.config.vocab_size == VOCAB + 5
    assert model.get_output_embeddings().weight.shape == (VOCAB + 5, 16)
    assert is_tied(model) is tied
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "tied llama"])
def test_new_rows_are_initialised_like_the_others_and_differ(tmp_path: Path, kind: str) -> None:
    writer, options, _ = GROWABLE[kind]
    model = _build(writer(tmp_path / "model", **options)).model
    grow_vocabulary(model, VOCAB + 500)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        new = weight[VOCAB:].detach()
        assert new.std().item() == pytest.approx(0.02, rel=0.1)  # Llama's initializer_range
        assert abs(new.mean().item()) < 0.002
        assert len(torch.unique(new, dim=0)) == 500


def test_a_grown_model_predicts_over_the_new_vocabulary(tmp_path: Path) -> None:
    model = _build(write_llama(tmp_path / "model")).model
    grow_vocabulary(model, VOCAB + 5)
    assert model(torch.tensor([[VOCAB + 4, 0]])).logits.shape == (1, 2, VOCAB + 5)


def test_a_model_without_embeddings_is_refused(tmp_path: Path) -> None:
    model = _build(write_custom(tmp_path / "bare", "oracle")).model
    assert embedding_rows(model) == VOCAB  # from its config
    assert not is_tied(model)
    with pytest.raises(ModelError) as caught:
        grow_vocabulary(model, VOCAB + 5)
    assert str(caught.value) == "the tokenizer needs 265 embedding rows, but KitModel does not expose its embeddings"
    assert "vocab_size 265" in caught.value.problems[0].fix


def test_a_tokenizer_smaller_than_the_model_never_shrinks_it(workspace: Workspace, byte_tokenizer: Path) -> None:
    write_llama(workspace.path / "model", vocab_size=300)
    workspace.jsonl("data.jsonl", ["x" * 100])
    result = workspace.pretrain(tokenizer=str(byte_tokenizer), training__max_steps=1)
    assert result.code == 0, result.err
    assert "Resizing" not in result.out
    final = workspace.path / "run" / "final"
    assert load_file(final / "model.safetensors")["model.embed_tokens.weight"].shape == (300, 16)
    assert json.loads((final / "config.json").read_text())["vocab_size"] == 300
