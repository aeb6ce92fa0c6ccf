"""Small model directories. The trainer takes any directory with custom code, so the model is the measuring tool.

Custom code is written as text, the way a user's directory holds it.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from tests.kit.tokenizers import write_byte_tokenizer

VOCAB = 260
"""Room for the 256 bytes, `<eos>` and a few more."""

_CONFIGURATION = """
from transformers import PretrainedConfig


class KitConfig(PretrainedConfig):
    model_type = "kit"

    def __init__(self, vocab_size=260, hidden_size=16, shift=1, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.shift = shift
        self.num_hidden_layers = 1
        super().__init__(**kwargs)
"""

_HEADER = """
import json
import os
import pathlib
import random
import signal

import numpy
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from torch._subclasses.fake_tensor import FakeTensor

from .configuration_kit import KitConfig


def is_rehearsal(input_ids):
    # The product looks for FFTs, and estimates memory, with tensors that have no values.
    return isinstance(input_ids, FakeTensor)
"""

_ACCESSORS = """def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, value):
        self.head = value
"""
"""Stands where a model's code says #ACCESSORS."""

_PROBE = '''

class KitModel(PreTrainedModel):
    """Embedding + head that writes what it is called with to $PROBE_DIR/rank{RANK}.jsonl."""

    config_class = KitConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    #ACCESSORS

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None, use_cache=None):
        if is_rehearsal(input_ids):
            return CausalLMOutput(logits=self.head(self.embed(input_ids)))
        rank = os.environ.get("RANK", "0")
        record = {
            "input_ids": input_ids.tolist(),
            "labels": None if labels is None else labels.tolist(),
            "attention_mask": None if attention_mask is None else attention_mask.tolist(),
            "position_ids": None if position_ids is None else position_ids.tolist(),
            "use_cache": use_cache,
            "dtype": str(self.embed.weight.dtype),
            "autocast": torch.is_autocast_enabled("cpu"),
            "training": self.training,
        }
        with open(pathlib.Path(os.environ["PROBE_DIR"]) / f"rank{rank}.jsonl", "a") as sink:
            sink.write(json.dumps(record) + "\\n")
        return CausalLMOutput(logits=self.head(self.embed(input_ids)))
'''

_ORACLE = '''

class KitModel(PreTrainedModel):
    """Logits at t are one-hot (x 30) on the token at t + shift. Its own loss does not shift and is a trap."""

    config_class = KitConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, input_ids, labels=None):
        ahead = torch.roll(input_ids, -self.config.shift, dims=1)
        logits = 30.0 * nn.functional.one_hot(ahead, self.config.vocab_size).float() + 0.0 * self.scale
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)
'''

_BUFFERS = '''
from .helper_kit import decay_table


class KitModel(PreTrainedModel):
    """Non-persistent buffer and a plain tensor attribute made in __init__, and nothing that restores them."""

    config_class = KitConfig
    _tied_weights_keys = {"head.weight": "embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("table", decay_table(config.hidden_size), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.offsets = torch.arange(config.hidden_size) / config.hidden_size
        self.post_init()

    #ACCESSORS

    def forward(self, input_ids):
        return CausalLMOutput(logits=self.head(self.embed(input_ids) * self.table + self.offsets))
'''

_HELPER = """
import torch

from .constants_kit import BASE


def decay_table(size):
    return torch.exp(-torch.arange(size) / BASE)


def convolve(x, h):
    raise NotImplementedError("write_blocks puts the real one here")
"""

_ROUTED = '''

class KitModel(PreTrainedModel):
    """Cross entropy that no parameter changes, and an auxiliary loss that is linear in one: grad_norm is `factor`."""

    config_class = KitConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.router = nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size) + 0.0 * self.router
        output = CausalLMOutput(logits=logits)
        output["aux_loss"] = self.config.factor * self.router.sum()
        return output
'''

_FAILING = '''

class KitModel(PreTrainedModel):
    """Misbehaves at forward number `at`: config.kind is nan, grad (infinite gradient) or raise."""

    config_class = KitConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.calls = 0
        self.post_init()

    def forward(self, input_ids):
        self.calls += 1
        logits = self.head(self.embed(input_ids))
        if self.calls == self.config.at and os.environ.get("RANK", "0") == str(getattr(self.config, "only_rank", 0)):
            if self.config.kind == "raise":
                raise RuntimeError("the model broke on purpose")
            if self.config.kind == "nan":
                logits = logits * float("nan")
            if self.config.kind == "grad":
                logits.register_hook(lambda gradient: gradient * float("inf"))
        return CausalLMOutput(logits=logits)
'''

_BLOCKS = '''
from .helper_kit import convolve


class KitAttention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class KitMoE(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.router = nn.Linear(size, 2)
        self.experts = nn.ModuleList([nn.Linear(size, size) for _ in range(2)])

    def forward(self, x):
        chosen = self.router(x).float().argmax(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero(as_tuple=True)
            y = y.index_put(rows, expert(x[rows]).to(y.dtype))
        return y


class KitSelectiveScan(nn.Module):
    """h_t = exp(dt A) h_(t-1) + dt x_t, y = h + D x, with the parameter names of Mamba's code."""

    def __init__(self, size):
        super().__init__()
        self.proj = nn.Linear(size, size)
        self.A_log = nn.Parameter(torch.linspace(0.0, 1.0, size))
        self.dt_bias = nn.Parameter(torch.zeros(size))
        self.D = nn.Parameter(torch.ones(size))

    def forward(self, x):
        u = self.proj(x)
        dt = nn.functional.softplus(self.dt_bias)
        decay = torch.exp(-dt * torch.exp(self.A_log))
        h, out = torch.zeros_like(u[:, 0]), []
        for t in range(u.shape[1]):
            h = decay * h + dt * u[:, t]
            out.append(h + self.D * u[:, t])
        return torch.stack(out, 1).to(x.dtype)


class KitHyena(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.proj = nn.Linear(size, 2 * size)
        self.filter = nn.Parameter(0.1 * torch.randn(64, size))
        self.out = nn.Linear(size, size)

    def forward(self, x):
        gate, u = self.proj(x).chunk(2, dim=-1)
        length = x.shape[1]
        spectrum = torch.fft.rfft(u, n=2 * length, dim=1) * torch.fft.rfft(self.filter[:length], n=2 * length, dim=0)
        return self.out(gate * torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length])


class KitRetention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.qkv = nn.Linear(size, 3 * size)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        steps = torch.arange(x.shape[1], device=x.device)
        distance = (steps[:, None] - steps[None, :]).clamp(min=0)
        decay = torch.where(steps[:, None] >= steps[None, :], 0.9 ** distance.float(), 0.0)
        return ((q @ k.transpose(1, 2)) * decay.to(q.dtype) / x.shape[-1]) @ v


class Mixer(nn.Module):
    """Says nothing of what it is; the FFT is in another file."""

    def __init__(self, size):
        super().__init__()
        self.filter = nn.Parameter(0.1 * torch.randn(64, size))
        self.out = nn.Linear(size, size)

    def forward(self, x):
        return self.out(convolve(x, self.filter[: x.shape[1]]))


MIXERS = {
    "attention": KitAttention,
    "moe": KitMoE,
    "ssm": KitSelectiveScan,
    "hyena": KitHyena,
    "retention": KitRetention,
    "helper": Mixer,
}


class Block(nn.Module):
    def __init__(self, kind, size):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.mixer = MIXERS[kind](size)

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class KitModel(PreTrainedModel):
    """One block for each entry of config.kinds."""

    config_class = KitConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(kind, config.hidden_size) for kind in config.kinds])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    #ACCESSORS

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
'''

_EXPERTS = '''

class Expert(nn.Module):
    def __init__(self, size, width):
        super().__init__()
        self.up = nn.Linear(size, width, bias=False)
        self.down = nn.Linear(width, size, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    """Micro-batch number p of the run (over all ranks) uses expert p % 2 and no other."""

    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleList([Expert(config.hidden_size, width) for width in config.widths])
        self.unused = nn.Linear(config.hidden_size, config.hidden_size)
        self.calls = 0

    def forward(self, x):
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        number = self.calls * world + rank
        self.calls += 1
        return x + self.experts[number % 2](x), None


class KitModel(PreTrainedModel):
    """Two blocks of experts; which one runs depends on the rank. One linear per block is never used."""

    config_class = KitConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(2)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x, _ = layer(x)
        return CausalLMOutput(logits=self.head(x))
'''

_STATEFUL = '''

class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.mix = nn.Linear(size, size)
        self.unused = nn.Linear(size, size)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x):
        self.calls += 1
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return x + self.dropout(torch.tanh(self.mix(x - self.mean))) * (1 + 0.01 * self.calls)


class KitModel(PreTrainedModel):
    """Dropout, two kinds of buffers that training changes, unused parameters, Python's and NumPy's randomness.

    At forward number $STOP_AT of this process, rank $STOP_RANK sends itself $STOP_SIGNAL.
    """

    config_class = KitConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config.hidden_size) for _ in range(2)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.forwards = 0
        self.post_init()

    def forward(self, input_ids):
        if not is_rehearsal(input_ids):
            self.note(input_ids)
        x = self.embed(input_ids)
        if self.config.random_scale:
            x = x * (1 + 0.1 * random.random() + 0.1 * numpy.random.standard_normal())
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))

    def note(self, input_ids):
        self.forwards += 1
        rank = os.environ.get("RANK", "0")
        if "PROBE_DIR" in os.environ:
            with open(pathlib.Path(os.environ["PROBE_DIR"]) / f"rank{rank}.jsonl", "a") as sink:
                sink.write(json.dumps(input_ids.tolist()) + "\\n")
        if self.forwards == int(os.environ.get("STOP_AT", "0")) and rank == os.environ.get("STOP_RANK", "0"):
            os.kill(os.getpid(), signal.Signals[os.environ.get("STOP_SIGNAL", "SIGTERM")])
'''

_FAULTY = '''
from .fault_kit import strike, strike_while_data_is_prepared


class KitModel(PreTrainedModel):
    """Does what $FAULT says: `phase:kind:rank` with phase load, data, step or save and kind raise, exit or kill."""

    config_class = KitConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        strike("load")
        strike_while_data_is_prepared()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.calls = 0
        self.post_init()

    def forward(self, input_ids):
        self.calls += 1
        if self.calls == 3:
            strike("step")
        return CausalLMOutput(logits=self.head(self.embed(input_ids)))

    def state_dict(self, *args, **kwargs):
        if self.calls:
            strike("save")
        return super().state_dict(*args, **kwargs)
'''

_FAULT = '''
import os
import pathlib
import signal
import threading
import time

FOLDER = pathlib.Path(os.environ["FAULT_DIR"])
PHASE, KIND, RANK = os.environ["FAULT"].split(":")
SECONDS = float(os.environ.get("FAULT_SECONDS", "60"))  # how long tokenising takes while another rank fails


def strike(phase):
    if phase != PHASE or os.environ.get("RANK", "0") != RANK:
        return
    (FOLDER / "struck").write_text(str(time.time()))
    if KIND == "raise":
        raise RuntimeError("the model broke on purpose")
    if KIND == "exit":
        os._exit(9)
    os.kill(os.getpid(), signal.SIGKILL)


def strike_while_data_is_prepared():
    """On a rank that waits for the data: end it as soon as rank 0 has begun."""

    def wait():
        while not (FOLDER / "preparing").exists():
            time.sleep(0.05)
        strike("data")

    if PHASE == "data" and RANK != "0":
        threading.Thread(target=wait, daemon=True).start()
'''

_TOKENIZATION = '''
import time

from transformers import PreTrainedTokenizerFast

from .fault_kit import FOLDER, PHASE, RANK, SECONDS, strike


class KitTokenizer(PreTrainedTokenizerFast):
    """Tokenising fails, or goes on and on while another rank is made to fail."""

    def __call__(self, *args, **kwargs):
        (FOLDER / "preparing").touch()
        strike("data")
        if PHASE == "data" and RANK != "0":
            time.sleep(SECONDS)
        return super().__call__(*args, **kwargs)
'''

_GATED = '''
from .gate_kit import reach


class Block(nn.Module):
    def __init__(self, size, dropout):
        super().__init__()
        self.mix = nn.Linear(size, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(torch.tanh(self.mix(x)))


class KitModel(PreTrainedModel):
    """Stops at the gates that $GATES names; writes the ids of each forward pass to $PROBE_DIR/rank{RANK}.jsonl.

    At forward number $STOP_AT of this process, rank $STOP_RANK sends itself SIGTERM.
    """

    config_class = KitConfig
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        reach("build")
        dropout = getattr(config, "dropout", 0.0)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config.hidden_size, dropout) for _ in range(2)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.forwards = 0
        self.post_init()

    def forward(self, input_ids):
        if not is_rehearsal(input_ids):
            self.note(input_ids)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))

    def note(self, input_ids):
        self.forwards += 1
        reach("forward")
        rank = os.environ.get("RANK", "0")
        if "PROBE_DIR" in os.environ:
            with open(pathlib.Path(os.environ["PROBE_DIR"]) / f"rank{rank}.jsonl", "a") as sink:
                sink.write(json.dumps(input_ids.tolist()) + "\\n")
        if self.forwards == int(os.environ.get("STOP_AT", "0")) and rank == os.environ.get("STOP_RANK", "0"):
            os.kill(os.getpid(), signal.SIGTERM)

    def save_pretrained(self, *args, **kwargs):
        reach("save")
        return super().save_pretrained(*args, **kwargs)
'''

_GATE = '''
"""Places where a process waits until the test lets it go on.

$GATES: places as `name-number`, divided by spaces: `forward-3` is this process's third forward pass. It then makes
$GATE_DIR/at-NAME-NUMBER-RANK and waits for $GATE_DIR/go-NAME-NUMBER. signals-RANK gets a byte for each signal that
the process has received since its tokenizer or model was loaded.
"""

import atexit
import collections
import os
import pathlib
import signal
import sys
import threading
import time

FOLDER = pathlib.Path(os.environ.get("GATE_DIR", "."))
GATES = os.environ.get("GATES", "").split()
RANK = os.environ.get("RANK", "0")
# The starting weights of fsdp are built by a process of their own.
HELPER = getattr(sys.modules["__main__"].__spec__, "name", "") == "eulerforge.models.initial"

_visits = collections.Counter()


def reach(name):
    """Wait here if it is a gate."""
    name = f"helper_{name}" if HELPER else name
    _visits[name] += 1
    place = f"{name}-{_visits[name]}"
    if place in GATES:
        (FOLDER / f"at-{place}-{RANK}").touch()
        deadline = time.monotonic() + 120
        while not (FOLDER / f"go-{place}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)


if GATES and not HELPER and threading.current_thread() is threading.main_thread():
    # The system's own note of a signal: it comes whatever the handler does.
    notes = os.open(FOLDER / f"signals-{RANK}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.set_blocking(notes, False)
    signal.set_wakeup_fd(notes)
    atexit.register(reach, "exit")


class _Last:
    """Goes when Python takes the modules apart, after it has put the default handlers of signals back."""

    def __init__(self):
        self.reach = reach

    def __del__(self):
        self.reach("teardown")


_last = _Last()
'''

_GATED_TOKENIZATION = '''
from transformers import PreTrainedTokenizerFast

from .gate_kit import reach


class KitTokenizer(PreTrainedTokenizerFast):
    """Tokenising may be stopped at the gate `tokenize`."""

    def __call__(self, *args, **kwargs):
        reach("tokenize")
        return super().__call__(*args, **kwargs)
'''

CODE = {
    "gated": _GATED,
    "faulty": _FAULTY,
    "blocks": _BLOCKS,
    "experts": _EXPERTS,
    "stateful": _STATEFUL,
    "probe": _PROBE,
    "oracle": _ORACLE,
    "buffers": _BUFFERS,
    "routed": _ROUTED,
    "failing": _FAILING,
}


def write_custom(path: Path, code: str, /, **config: Any) -> Path:
    """Write a model directory with custom code.

    Args:
        code: a key of `CODE`.
        config: further keys of config.json.
    """
    path.mkdir(parents=True)
    # Unlike code in each kind: transformers maps a configuration class to one model class per process, so two kinds
    # with the same configuration file would share the model of whichever came first.
    (path / "configuration_kit.py").write_text(f"# {code}\n{_CONFIGURATION}")
    (path / "modeling_kit.py").write_text((_HEADER + CODE[code]).replace("#ACCESSORS", _ACCESSORS))
    (path / "helper_kit.py").write_text(_HELPER)
    (path / "constants_kit.py").write_text("BASE = 8.0\n")
    values = {
        "architectures": ["KitModel"],
        "model_type": "kit",
        "vocab_size": VOCAB,
        "auto_map": {
            "AutoConfig": "configuration_kit.KitConfig",
            "AutoModelForCausalLM": "modeling_kit.KitModel",
        },
        **config,
    }
    (path / "config.json").write_text(json.dumps(values))
    return path


_CONVOLVE = """
import torch.fft as transforms


def convolve(x, h):
    n = 2 * x.shape[1]
    product = transforms.rfft(x, n=n, dim=1) * transforms.rfft(h, n=n, dim=0)
    return transforms.irfft(product, n=n, dim=1)[:, : x.shape[1]]
"""


def write_blocks(path: Path, kinds: list[str], **config: Any) -> Path:
    """A model of one block for each kind: attention, moe, ssm, hyena, retention, helper.

    Its code refers to `torch.fft` only if a block needs it: `hyena` in the block, `helper` in a file of its own.
    """
    write_custom(path, "blocks", kinds=kinds, **config)
    if "hyena" not in kinds:
        edit_code(path, "torch.fft.", "torch.no_fft_here.")
    replace_helper(path, _CONVOLVE if "helper" in kinds else _HELPER)
    return path


def edit_code(path: Path, old: str, new: str) -> None:
    """Change the code of a model; it becomes another model for this process, too."""
    code = path / "modeling_kit.py"
    text = code.read_text()
    assert old in text
    code.write_text(text.replace(old, new))
    _stamp(path)


def replace_helper(path: Path, code: str) -> None:
    """Give a model another helper_kit.py; it becomes another model for this process, too."""
    (path / "helper_kit.py").write_text(code)
    _stamp(path)


def _stamp(path: Path) -> None:
    """transformers keeps one model class for each configuration file, told apart by content."""
    file = path / "configuration_kit.py"
    file.write_text(f"# {uuid.uuid4()}\n{file.read_text()}")


def write_faulty(path: Path) -> Path:
    """A model directory with its own tokenizer, both under the command of $FAULT and $FAULT_DIR."""
    write_custom(path, "faulty")
    (path / "fault_kit.py").write_text(_FAULT)
    _write_tokenizer_with_code(path, _TOKENIZATION)
    return path


def write_gated(path: Path, **config: Any) -> Path:
    """A model directory with its own tokenizer, both with gates at which a test holds them ($GATES, $GATE_DIR).

    Args:
        config: further keys of config.json: `dropout`.
    """
    write_custom(path, "gated", **config)
    (path / "gate_kit.py").write_text(_GATE)
    _write_tokenizer_with_code(path, _GATED_TOKENIZATION)
    return path


def _write_tokenizer_with_code(path: Path, code: str) -> None:
    (path / "tokenization_kit.py").write_text(code)
    write_byte_tokenizer(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "KitTokenizer"
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_kit.KitTokenizer"]}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def write_llama(path: Path, **config: Any) -> Path:
    """Write the config.json of a tiny Llama (no weights)."""
    path.mkdir(parents=True)
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        **config,
    }
    (path / "config.json").write_text(json.dumps(values))
    return path


def write_mixtral(path: Path, **config: Any) -> Path:
    """Write the config.json of a tiny Mixtral, a Hugging Face model with router loss and fused experts."""
    values = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        **config,
    }
    return write_llama(path, **values)
