"""The shipped demo model, loaded as a user loads it: by its directory, with trust_remote_code."""

import importlib
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

PRESET = Path(__file__).resolve().parents[2] / "presets" / "models" / "tiny_hybrid"
LAYER_KINDS = ["hyena", "attention", "retention", "attention_moe"]


def load_config(**overrides):
    return AutoConfig.from_pretrained(PRESET, trust_remote_code=True, **overrides)


def build(layer_pattern=None, seed=0, **overrides):
    if layer_pattern is not None:
        overrides["layer_pattern"] = layer_pattern
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(load_config(**overrides), trust_remote_code=True).eval()


def module_of(model, kind):
    """The `blocks`, `modeling` or `configuration` module that the model's class was loaded from."""
    return importlib.import_module(type(model).__module__.replace("modeling_", f"{kind}_"))


def random_ids(*shape, seed=1):
    return torch.randint(1, 4096, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    """The model as shipped, with random weights. Tests must not change it."""
    return build()


@pytest.fixture(scope="module")
def reloaded(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)


# --- configuration ---


def test_parameter_count(model):
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000


def test_config_keeps_layer_pattern_through_saving(model, reloaded):
    assert model.config.layer_pattern == LAYER_KINDS
    assert reloaded.config.layer_pattern == LAYER_KINDS
    assert reloaded.config.num_hidden_layers == 4
    assert reloaded.config.use_cache is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layer_pattern": ["attention", "mamba"]}, "unknown entries 'mamba'; known ones are 'attention'"),
        ({"layer_pattern": []}, "layer_pattern is empty"),
        ({"hidden_size": 130}, "not a multiple of num_attention_heads"),
        ({"hidden_size": 12}, "is odd"),
        ({"num_experts_per_tok": 5}, "must be between 1 and num_experts"),
    ],
)
def test_config_rejects_what_cannot_be_built(model, overrides, message):
    with pytest.raises(ValueError, match=message):
        type(model.config)(**overrides)


def test_layer_type_assigned_later_is_rejected_by_the_model():
    with pytest.raises(ValueError, match="unknown entries 'mamba'"):
        build(["mamba"])


# --- causality and padding ---


@pytest.mark.parametrize("layer_pattern", [[name] for name in LAYER_KINDS] + [LAYER_KINDS], ids="+".join)
def test_causal(layer_pattern):
    # Larger weights than usual, so that one token's influence on the others is far above rounding errors.
    model = build(layer_pattern, initializer_range=0.1)
    changed_at = 9
    ids = random_ids(2, 24)
    changed = ids.clone()
    changed[:, changed_at] = (ids[:, changed_at] + 1) % 4096
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(dim=(0, 2))
    assert difference[:changed_at].max() < 1e-4
    assert difference[changed_at:].min() > 1e-2


def test_right_padding_changes_nothing(model):
    length = 21
    ids = random_ids(2, length)
    padded = torch.cat((ids, torch.zeros(2, 11, dtype=torch.long)), dim=1)
    mask = (torch.arange(32) < length).long().expand(2, -1)
    with torch.no_grad():
        plain = model(ids)
        masked = model(padded, attention_mask=mask)
        unmasked = model(padded)
    torch.testing.assert_close(masked.logits[:, :length], plain.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(masked.aux_loss, plain.aux_loss, atol=1e-7, rtol=1e-5)
    assert abs(unmasked.aux_loss - plain.aux_loss) > 1e-6  # so the comparison above could have failed


def test_all_padding_gives_finite_aux_loss(model):
    output = model(random_ids(1, 4), attention_mask=torch.zeros(1, 4, dtype=torch.long))
    assert output.aux_loss == 0


# --- forward and loss ---


@pytest.mark.parametrize("length", [1, 2, 3, 512])
def test_any_length(model, length):
    with torch.no_grad():
        output = model(random_ids(1, length), labels=random_ids(1, length))
    assert output.logits.shape == (1, length, 4096)
    assert output.logits.isfinite().all()


def test_loss_is_shifted_cross_entropy_plus_aux_loss(model):
    ids = random_ids(2, 16)
    labels = ids.clone()
    labels[0, 10:] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        summed = model(ids, labels=labels, num_items_in_batch=7)
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(output.loss, total / (targets != -100).sum() + output.aux_loss)
    torch.testing.assert_close(summed.loss, total / 7 + output.aux_loss)


def test_aux_loss_is_none_without_experts():
    output = build(["hyena", "attention"])(random_ids(1, 8), labels=random_ids(1, 8))
    assert output.aux_loss is None
    assert output.loss.isfinite()


def test_aux_loss_is_scaled_and_summed_over_layers(model):
    coefficient = model.config.router_aux_loss_coef
    double = build(["attention_moe", "attention_moe"], router_aux_loss_coef=2 * coefficient)
    ids = random_ids(4, 64)
    with torch.no_grad():
        # A router at its initialisation is close to balanced, where the loss of one layer is 1.
        assert model(ids).aux_loss.item() == pytest.approx(coefficient, rel=0.2)
        assert double(ids).aux_loss.item() == pytest.approx(4 * coefficient, rel=0.2)


def test_position_ids(model):
    ids = random_ids(2, 12)
    positions = torch.arange(12).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, position_ids=positions).logits)
        # Rotary positions are relative: a common offset changes nothing, a stretch does.
        torch.testing.assert_close(
            model(ids).logits, model(ids, position_ids=positions + 5).logits, atol=1e-5, rtol=0
        )
        assert not torch.allclose(model(ids).logits, model(ids, position_ids=3 * positions).logits, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    model = build().train()
    model(random_ids(4, 64), labels=random_ids(4, 64)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_expert_without_tokens_gets_a_zero_gradient():
    model = build(["attention_moe"], num_experts=8, num_experts_per_tok=1).train()
    model(random_ids(1, 1), labels=random_ids(1, 1)).logits.sum().backward()
    norms = [sum(p.grad.abs().sum().item() for p in e.parameters()) for e in model.model.layers[0].mlp.experts]
    assert sorted(norm > 0 for norm in norms) == [False] * 7 + [True]


def test_autocast_bfloat16():
    model = build().train()
    ids = random_ids(2, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(output.loss, model(ids, labels=ids).loss, atol=0.02, rtol=0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # the new name is not in 5.5
def test_gradient_checkpointing_gives_the_same_gradients():
    ids = random_ids(2, 16)
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert all(block.gradient_checkpointing is checkpointing for block in model.model.layers)
        model(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)


# --- saving, tying, marks, generation ---


def test_round_trip_is_exact(model, reloaded):
    ids = random_ids(2, 32)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)
    saved = dict(model.named_parameters())
    assert all(torch.equal(saved[name], parameter) for name, parameter in reloaded.named_parameters())


def test_buffers_after_loading_equal_their_formulas(reloaded):
    buffers = dict(reloaded.named_buffers())
    head = torch.arange(4, dtype=torch.float64)
    pair = torch.arange(16, dtype=torch.float64)
    expected = {
        "model.rotary.inv_freq": 10000.0 ** (-2 * pair / 32),
        "model.layers.0.mixer.filter.bands": torch.linspace(1e-4, 7, 8, dtype=torch.float64),
        "model.layers.2.mixer.log_decay": (1 - 2.0 ** (-5 - head)).log(),
    }
    assert buffers.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name].double(), value, atol=0, rtol=1e-6)
    assert not buffers.keys() & reloaded.state_dict().keys()


def test_no_weight_decay_marks(model, reloaded):
    parameters = dict(model.named_parameters())
    expected = {name for name in parameters if "norm" in name} | {
        "model.layers.0.mixer.skip",
        "model.layers.0.mixer.filter.log_decay_rate",
        "model.layers.0.mixer.filter.mlp.1.frequency",
        "model.layers.0.mixer.filter.mlp.3.frequency",
    }
    for candidate in (model, reloaded):
        marked = {n for n, p in candidate.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert marked == expected
    assert any(parameters[name].dim() > 1 for name in expected)


def test_embeddings_stay_tied_after_resize(tmp_path):
    model = build()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(4200, mean_resizing=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == 4200
    assert model(random_ids(1, 4)).logits.shape == (1, 4, 4200)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_untied_embeddings():
    model = build(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("use_cache", [None, True])
def test_generate_equals_repeated_forward(model, use_cache):
    ids = random_ids(2, 5)
    flags = {} if use_cache is None else {"use_cache": use_cache}
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, **flags)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, ids)


# --- the blocks against their definitions ---


@pytest.mark.parametrize("length", [1, 2, 17])
def test_fft_convolution_equals_direct_convolution(model, length):
    u = torch.randn(2, length, 3, dtype=torch.float64)
    h = torch.randn(length, 3, dtype=torch.float64)
    expected = torch.zeros_like(u)
    for t in range(length):
        for s in range(t + 1):
            expected[:, t] += h[t - s] * u[:, s]
    torch.testing.assert_close(module_of(model, "blocks").fft_causal_convolution(u, h), expected)


def test_hyena_filter_does_not_depend_on_the_length(model):
    hyena_filter = model.model.layers[0].mixer.filter
    torch.testing.assert_close(hyena_filter(40)[:13], hyena_filter(13), atol=1e-6, rtol=0)


def test_parallel_retention_equals_recurrent_form(model):
    blocks = module_of(model, "blocks")
    q, k, v = torch.randn(3, 2, 4, 19, 8, dtype=torch.float64)
    gamma = (1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64)))[:, None, None]
    state = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    outputs = []
    for t in range(19):
        state = gamma * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None, :] @ state).squeeze(-2))
    parallel = blocks.parallel_retention(q, k, v, blocks.retention_log_decays(4))
    torch.testing.assert_close(parallel, torch.stack(outputs, dim=2), atol=1e-4, rtol=1e-4)


def test_load_balancing_loss_by_hand(model):
    loss = module_of(model, "blocks").load_balancing_loss
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4], [0.1, 0.1, 0.8]])
    chosen = torch.tensor([[0, 1], [0, 2], [2, 0]])
    # Without the last token: expert 0 has 2 of 4 assignments, experts 1 and 2 one each.
    by_hand = 3 * (0.5 * 0.6 + 0.25 * 0.15 + 0.25 * 0.25)
    assert loss(probabilities, chosen, torch.tensor([1, 1, 0])).item() == pytest.approx(by_hand)
    assert loss(probabilities[:2], chosen[:2], None).item() == pytest.approx(by_hand)


def test_mixture_equals_the_dense_sum_over_chosen_experts(model):
    mixture = model.model.layers[3].mlp
    x = torch.randn(2, 7, 128)
    with torch.no_grad():
        output, _ = mixture(x)
        probabilities = mixture.router(x).softmax(-1)
        kept = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2).indices, 1.0)
        weights = probabilities * kept
        weights = weights / weights.sum(-1, keepdim=True)
        dense = torch.stack([expert(x) for expert in mixture.experts], dim=-1)
        expected = (dense * weights[..., None, :]).sum(-1)
    torch.testing.assert_close(output, expected)
