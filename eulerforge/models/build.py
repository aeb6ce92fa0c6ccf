"""Hugging Face directory -> a model with real parameters and real buffers.

    AutoConfig -> from_config (on CPU, float32, seeded) -> weights copied in, if there are any -> vocabulary grown

`from_pretrained` is not used for the model that trains: transformers 5 builds on the meta device and leaves the
non-persistent buffers of custom code uninitialised (an EulerStack export's RoPE tables come back as noise). A model
built from its config has computed its buffers; only parameters and persistent buffers are then taken from the files.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eulerforge.errors import ModelError, reason_of
from eulerforge.models.directory import ModelDirectory, find_weights
from eulerforge.models.weights import read_weights

_SHOWN_KEYS = 4


@dataclass(frozen=True)
class BuiltModel:
    """The model and where its weights came from.

    Attributes:
        model: a transformers model on CPU in float32.
        origin: `initialised from seed 42` or the weight file.
    """

    model: Any
    origin: str


def build_model(
    directory: ModelDirectory, trust_remote_code: bool, seed: int, with_weights: bool = True
) -> BuiltModel:
    """Build the model and load its weights, if the directory has any (and they are wanted).

    The same seed gives the same initial weights, bit for bit, on one machine.

    Raises:
        ModelError: unknown architecture, code that fails, or weights that do not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _as_model_error(directory, "cannot read the configuration"):
        config = AutoConfig.from_pretrained(directory.path, trust_remote_code=trust_remote_code)
    torch.manual_seed(seed)
    with _as_model_error(directory, "cannot build the model"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            # A model may create single tensors in another dtype; masters are float32 throughout.
            parameter.data = parameter.data.float()
    origin = f"initialised from seed {seed}"
    if directory.weights is not None and with_weights:
        load_weights(model, directory.weights, directory, trust_remote_code)
        origin = directory.weights.name
    model.tie_weights()
    return BuiltModel(model, origin)


@contextlib.contextmanager
def _as_model_error(directory: ModelDirectory, what: str) -> Iterator[None]:
    """Failures of transformers or of the directory's own code become one line with the place that raised."""
    try:
        yield
    except (Exception, SystemExit) as error:  # code that exits must not pass for a run that finished
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).name in directory.code]
        frame = (own or frames)[-1]
        missing = isinstance(error, ModuleNotFoundError) or "packages that were not found" in str(error)
        raise ModelError(
            f"model_dir: {directory.path}: {what}: {type(error).__name__}: {reason_of(error)} "
            f"({Path(frame.filename).name}:{frame.lineno} in {frame.name})",
            "install the missing package with pip" if missing else "correct config.json or the model's code",
        ) from error


def build_grown(
    directory: ModelDirectory,
    trust_remote_code: bool,
    seed: int,
    rows: int,
    checkpoint: Path | None,
    report: Callable[[Any], None] = lambda model: None,
) -> Any:
    """The model with `rows` embedding rows at least; on CPU, in float32.

    Args:
        checkpoint: where the weights come from, None for the directory's own (or fresh ones).
        report: told the model before it grows.

    Raises:
        ModelError: as `build_model` and `grow_vocabulary` raise it, or the checkpoint's weights do not fit.
    """
    model = build_model(directory, trust_remote_code, seed, with_weights=checkpoint is None).model
    report(model)
    grow_vocabulary(model, rows)
    if checkpoint is not None:
        weights = find_weights(checkpoint)
        if weights is None:
            raise ModelError(f"{checkpoint} holds no weights", "resume from another checkpoint")
        load_weights(model, weights, directory, trust_remote_code)
        model.tie_weights()
    return model


def load_weights(model: Any, weights: Path, directory: ModelDirectory, trust_remote_code: bool) -> None:
    """Copy every tensor of a weight file (or index) into the model; all must fit, and none may be missing.

    Files whose names are the model's own (custom code, most architectures) are read tensor by tensor. Where
    transformers stores an architecture under other names (fused experts of Mixtral, for example), it does the
    conversion, and its result is copied, so that the buffers stay those of the fresh model.
    """
    state = model.state_dict()
    aliases = _aliases(state)
    ignorable = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    missing, unexpected, misshaped = set(state), [], []
    with torch.no_grad():
        for name, tensor in read_weights(weights):
            if name not in state:
                if not any(pattern.search(name) for pattern in ignorable):
                    unexpected.append(name)
            elif state[name].shape != tensor.shape:
                misshaped.append(f"{name} {list(tensor.shape)} in the file, {list(state[name].shape)} in the model")
                missing -= aliases[name]
            else:
                state[name].copy_(tensor)
                missing -= aliases[name]
    if unexpected and missing and not misshaped:
        report = _load_converted(model, weights.parent, directory, trust_remote_code)
        missing, unexpected, misshaped = set(report[0]), list(report[1]), list(report[2])
    faults = [
        f"{len(keys)} {kind}: {', '.join(sorted(keys)[:_SHOWN_KEYS])}" + (", ..." if len(keys) > _SHOWN_KEYS else "")
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if keys
    ]
    if faults:
        raise ModelError(
            f"{weights}: the weights do not fit config.json: {'; '.join(faults)}",
            "use the weights that belong to this config.json, or remove the weight files to start from fresh ones",
        )


def _aliases(state: Mapping[str, torch.Tensor]) -> dict[str, set[str]]:
    """Each key with all keys that are the same tensor (tied weights are stored once)."""
    groups: dict[tuple[int, torch.Size, tuple[int, ...]], set[str]] = {}
    for name, tensor in state.items():
        identity = (
            (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (id(tensor), tensor.shape, ())
        )
        groups.setdefault(identity, set()).add(name)
    return {name: group for group in groups.values() for name in group}


def _load_converted(
    model: Any, source: Path, directory: ModelDirectory, trust_remote_code: bool
) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Let transformers map the file's names, copy its state; (missing, unexpected, misshaped) names."""
    from transformers import AutoModelForCausalLM

    with _as_model_error(directory, "cannot load the weights"), _quiet_transformers():
        loaded, report = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model.load_state_dict(loaded.state_dict(), strict=True)
    misshaped = [str(entry[0]) for entry in report["mismatched_keys"]]
    return sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), misshaped


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers prints a table of keys that do not fit; the error says it in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def embedding_rows(model: Any) -> int:
    """Rows of the input embedding; `config.vocab_size` for models that do not expose one."""
    embedding, _ = embedding_tables(model)
    if embedding is not None:
        return int(embedding.weight.shape[0])
    return int(model.config.vocab_size)


def embedding_tables(model: Any) -> tuple[Any, Any]:
    """Input embedding and output head; None for what the model does not expose or what has no weight."""
    tables = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            table = getattr(model, name)()
        except (NotImplementedError, AttributeError):  # transformers leaves them to the model's own code
            table = None
        tables.append(table if hasattr(table, "weight") else None)
    return tables[0], tables[1]


def grow_vocabulary(model: Any, rows: int) -> None:
    """Grow input and output embeddings to `rows`; old rows stay untouched, tied stays tied, never shrinks.

    New rows come from the model's own initialiser. (transformers' default, a draw around the mean of the old rows
    with 1e-9 of their covariance, would make all new rows of an untrained model practically equal.)

    Raises:
        ModelError: the model does not expose embeddings that can grow.
    """
    if rows <= embedding_rows(model):
        return
    advice = (
        f"implement get_input_embeddings/set_input_embeddings (and the output pair) in the model, "
        f"or build it with vocab_size {rows}"
    )
    if embedding_tables(model)[0] is None:
        raise ModelError(
            f"the tokenizer needs {rows} embedding rows, but {type(model).__name__} does not expose its embeddings",
            advice,
        )
    was_tied = is_tied(model)
    try:
        model.resize_token_embeddings(rows, mean_resizing=False)
    except (NotImplementedError, AttributeError, RuntimeError, ValueError) as error:
        raise ModelError(f"cannot grow the embeddings to {rows} rows: {reason_of(error)}", advice) from error
    _, output = embedding_tables(model)
    if embedding_rows(model) != rows or (output is not None and output.weight.shape[0] != rows):
        raise ModelError(f"growing the embeddings to {rows} rows had no effect on {type(model).__name__}", advice)
    if was_tied and not is_tied(model):
        raise ModelError("growing the embeddings untied the output head", "give the model a tie_weights() that ties")


def is_tied(model: Any) -> bool:
    """Whether input embedding and output head are one parameter."""
    embedding, output = embedding_tables(model)
    return embedding is not None and output is not None and embedding.weight is output.weight
