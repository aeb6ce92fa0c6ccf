"""What can be told from a model directory without importing anything of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eulerforge.errors import ModelError
from eulerforge.models.blocks import FoundBlock, find_blocks
from eulerforge.models.directory import ModelDirectory
from eulerforge.precision.rules import RULES

AUTO_MAP = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}


def _directory(tmp_path: Path, files: dict[str, str] | None = None, **config: Any) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "x", **config}))
    for name, text in (files or {}).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def _custom(tmp_path: Path, modeling: str, **others: str) -> Path:
    """A directory whose modeling_x.py is `modeling`; keyword `helper_py` is the file helper.py."""
    files = {"configuration_x.py": "", "modeling_x.py": modeling}
    files |= {f"{name.removesuffix('_py')}.py": text for name, text in others.items()}
    return _directory(tmp_path, files, auto_map=AUTO_MAP)


def _error(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        ModelDirectory.read(path)
    return str(caught.value).replace(str(path), "DIR")


def test_code_is_followed_through_relative_imports_only(tmp_path: Path) -> None:
    path = _directory(
        tmp_path,
        {
            "configuration_x.py": "import os\n",
            "modeling_x.py": "from .configuration_x import XConfig\nfrom .layers import (\n    A,\n)\n",
            "layers.py": "class A:\n    def f(self):\n        if self:\n            from .lazy import g\n",
            "lazy.py": "from .modeling_x import XModel  # a circle\n",
            "unused.py": "import nothing_like_this\n",
            "test_x.py": "from .modeling_x import XModel\n",
            "os.py": "not python at all(",
        },
        auto_map=AUTO_MAP,
    )
    directory = ModelDirectory.read(path)
    assert set(directory.code) == {"configuration_x.py", "modeling_x.py", "layers.py", "lazy.py"}
    assert directory.has_custom_code
    assert directory.path == path


@pytest.mark.parametrize(
    "statement", ["from . import helper", "from .pkg import x", "from .pkg.leaf import x", "from ..up import x"]
)
def test_relative_imports_that_transformers_cannot_load_are_refused(tmp_path: Path, statement: str) -> None:
    """transformers copies the files of `from .name import ...` only, and fails on the others when it loads them."""
    path = _custom(tmp_path, f"import os\n{statement}\n", helper_py="x = 1\n")
    (path / "pkg").mkdir()
    (path / "pkg" / "__init__.py").write_text("x = 1\n")
    (path / "pkg" / "leaf.py").write_text("x = 1\n")
    message = _error(path)
    assert message.startswith("DIR/modeling_x.py:2: transformers cannot load this relative import")


def test_every_class_of_auto_map_is_reached_and_hub_references_are_not(tmp_path: Path) -> None:
    path = _directory(
        tmp_path,
        {"configuration_x.py": "", "tokenization_x.py": "", "fast_x.py": ""},
        auto_map={
            "AutoConfig": "configuration_x.XConfig",
            "AutoTokenizer": ["tokenization_x.XTokenizer", "fast_x.XFast"],
            "AutoModel": "someone/repository--modeling_x.XModel",
            "AutoProcessor": [None, None],
        },
    )
    assert set(ModelDirectory.read(path).code) == {"configuration_x.py", "tokenization_x.py", "fast_x.py"}


@pytest.mark.parametrize(
    ("auto_map", "expected"),
    [
        (None, False),
        ({}, False),
        ({"AutoTokenizer": "t.T"}, False),
        ({"AutoConfig": "t.T"}, True),
        ({"AutoModelForCausalLM": "who/what--m.M"}, True),
    ],
)
def test_whether_building_the_model_runs_code(
    tmp_path: Path, auto_map: dict[str, str] | None, expected: bool
) -> None:
    config = {} if auto_map is None else {"auto_map": auto_map}
    assert ModelDirectory.read(_directory(tmp_path, {"t.py": ""}, **config)).has_custom_code is expected


def test_broken_directories(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert _error(file) == "model_dir: DIR is not a directory (a file there)"
    assert _error(tmp_path / "none") == "model_dir: DIR is not a directory (nothing there)"
    assert _error(tmp_path) == "model_dir: DIR has no config.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "DIR/config.json: not valid JSON: "),
        ("", "DIR/config.json: not valid JSON: "),
        ("[]", "DIR/config.json: must hold a JSON object"),
        ("{}", "DIR/config.json: has neither model_type nor auto_map, so no model class can be found"),
        ("[" * 100_000, "DIR/config.json: not valid JSON: "),
    ],
)
def test_broken_configurations(tmp_path: Path, text: str, message: str) -> None:
    path = _directory(tmp_path)
    (path / "config.json").write_text(text)
    assert _error(path).startswith(message)


@pytest.mark.parametrize(
    ("modeling", "message"),
    [
        ("from .helper import x\n", "DIR/helper.py is missing, wanted by modeling_x.py"),
        ("x = 1\ny = (\n", "DIR/modeling_x.py:2: not valid Python: "),
        ("x = 1\x00\n", "DIR/modeling_x.py"),
    ],
)
def test_broken_code(tmp_path: Path, modeling: str, message: str) -> None:
    assert _error(_custom(tmp_path, modeling)).startswith(message)


def test_a_missing_entry_names_the_key_of_auto_map(tmp_path: Path) -> None:
    path = _directory(tmp_path, {"configuration_x.py": ""}, auto_map=AUTO_MAP)
    assert _error(path) == "DIR/modeling_x.py is missing, wanted by config.json auto_map.AutoModelForCausalLM"


@pytest.mark.parametrize(
    ("modeling", "missing"),
    [
        ("import nopkg_a\n", ["nopkg_a"]),
        ("import nopkg_a.sub as n, nopkg_b\n", ["nopkg_a", "nopkg_b"]),
        ("from nopkg_a.sub import x\n", ["nopkg_a"]),
        ("class A:\n    import nopkg_a\n", ["nopkg_a"]),
        ("with open('x'):\n    import nopkg_a\n", ["nopkg_a"]),
        ("import nopkg_b\nimport nopkg_a\nimport nopkg_b\n", ["nopkg_a", "nopkg_b"]),
        ("try:\n    import nopkg_a\nexcept ImportError:\n    nopkg_a = None\n", []),
        ("if False:\n    import nopkg_a\n", []),
        ("def f():\n    import nopkg_a\n", []),
        ("class A:\n    def f(self):\n        import nopkg_a\n", []),
        ("import os, sys, json.decoder, math, torch\nfrom __future__ import annotations\n", []),
        ("from .configuration_x import XConfig\n", []),
    ],
)
def test_packages_that_loading_the_code_would_miss(tmp_path: Path, modeling: str, missing: list[str]) -> None:
    assert ModelDirectory.read(_custom(tmp_path, modeling)).missing_packages() == missing


FFT = [
    "import torch\ny = torch.fft.rfft(x)\n",
    "import torch as T\ny = T.fft.rfft(x)\n",
    "import torch.fft\n",
    "import torch.fft as F\n",
    "from torch import fft\n",
    "from torch import nn, fft as F\n",
    "from torch.fft import rfft\n",
    "def f(x):\n    from torch.fft import rfft as transform\n    return transform(x)\n",
    "import torch\nclass A:\n    f = staticmethod(torch.fft.irfft)\n",
]
NO_FFT = [
    "import numpy as np\ny = np.fft.rfft(x)\n",
    "import numpy\ny = numpy.fft.rfft(x)\n",
    "from numpy import fft\nfrom scipy.fft import rfft\n",
    "class A:\n    def f(self, x):\n        return self.fft(x)\n",
    "class A:\n    def f(self, x):\n        return self.torch.fft(x)\n",
    "def fft(x):\n    return x\ny = fft(1)\n",
    "# torch.fft\ntext = 'torch.fft.rfft'\n",
    "from .torch import fft\n",
    "import torch\ny = torch.ffts(x), torch.nn.fft\n",
]


@pytest.mark.parametrize("helper", [False, True], ids=["in the model", "in a helper"])
@pytest.mark.parametrize(("code", "expected"), [*((code, True) for code in FFT), *((code, False) for code in NO_FFT)])
def test_code_that_uses_torch_fft(tmp_path: Path, code: str, expected: bool, helper: bool) -> None:
    if helper:
        path = _custom(tmp_path, "from .helper import y\n", helper_py=code, torch_py="fft = 1\n")
    else:
        path = _custom(tmp_path, code, torch_py="fft = 1\n")
    name = "helper.py" if helper else "modeling_x.py"
    directory = ModelDirectory.read(path)
    assert directory.files_calling_fft() == ([name] if expected else [])
    found = (FoundBlock("fft", f"{name} calls torch.fft"),) if expected else ()
    assert find_blocks(directory) == found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": 512}, ("max_position_embeddings", 512)),
        ({"max_seq_len": 512}, ("max_seq_len", 512)),
        ({"n_positions": 1024}, ("n_positions", 1024)),
        ({"n_ctx": 64, "n_positions": 1024}, ("n_positions", 1024)),
        ({"max_sequence_length": 8}, ("max_sequence_length", 8)),
        ({"seq_length": 8}, ("seq_length", 8)),
        ({"max_position_embeddings": None, "max_seq_len": 9}, ("max_seq_len", 9)),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": "512"}, None),
    ],
)
def test_context_length(tmp_path: Path, config: dict[str, Any], expected: tuple[str, int] | None) -> None:
    assert ModelDirectory.read(_directory(tmp_path, **config)).context_length == expected


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ([], None),
        (["pytorch_model.bin"], "pytorch_model.bin"),
        (["pytorch_model.bin", "model.safetensors"], "model.safetensors"),
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["pytorch_model.bin.index.json", "pytorch_model.bin"], "pytorch_model.bin.index.json"),
        (["model-00001-of-00002.safetensors"], None),
    ],
)
def test_weights_are_found_in_the_order_of_transformers(
    tmp_path: Path, present: list[str], expected: str | None
) -> None:
    path = _directory(tmp_path, dict.fromkeys(present, ""))
    assert ModelDirectory.read(path).weights == (None if expected is None else path / expected)


@pytest.mark.parametrize(
    ("section", "expected"),
    [({"pretrained": "gpt2"}, "gpt2"), ({"pretrained": ""}, None), ({"pretrained": 5}, None), ("gpt2", None)],
)
def test_the_tokenizer_that_the_config_names(tmp_path: Path, section: Any, expected: str | None) -> None:
    directory = ModelDirectory.read(_directory(tmp_path, {"vocab.json": "{}"}, tokenizer=section))
    assert directory.suggested_tokenizer == expected
    assert directory.has_tokenizer


def test_a_directory_without_tokenizer_says_so(tmp_path: Path) -> None:
    directory = ModelDirectory.read(_directory(tmp_path, {"tokenizer_config.json": "{}"}))
    assert not directory.has_tokenizer
    assert directory.suggested_tokenizer is None


def test_blocks_of_an_eulerstack_config(tmp_path: Path) -> None:
    stack = {
        "pattern": [
            {"block": "attn", "ffn": {"type": "mlp"}},
            {"block": "mamba", "ffn": {"type": "moe", "experts": 8}},
            {"block": "retnet"},
            {"block": "attn", "ffn": {"type": "moe"}},
            {"block": "something_new"},
            "not a layer",
        ],
        "tail": [{"block": "hyena"}, {"block": "attention"}],
    }
    found = find_blocks(ModelDirectory.read(_directory(tmp_path, stack=stack)))
    assert found == (
        FoundBlock("attention", "config.json stack.pattern[0] block: attn"),
        FoundBlock("mamba", "config.json stack.pattern[1] block: mamba"),
        FoundBlock("moe", "config.json stack.pattern[1] ffn: moe"),
        FoundBlock("retnet", "config.json stack.pattern[2] block: retnet"),
        FoundBlock("hyena", "config.json stack.tail[0] block: hyena"),
    )
    assert {block.family for block in found} <= set(RULES)


@pytest.mark.parametrize("stack", [None, [], "x", {}, {"pattern": None, "tail": []}])
def test_a_config_without_a_stack_shows_no_blocks(tmp_path: Path, stack: Any) -> None:
    assert find_blocks(ModelDirectory.read(_directory(tmp_path, stack=stack))) == ()
