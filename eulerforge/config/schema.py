"""The typed preset: every key of `eulerforge pretrain`, its meaning, unit, range and default, in one place.

The models are frozen and refuse unknown keys. The descriptions become `eulerforge schema`.
Rules between keys are in `checks.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from eulerforge.config.fields import (
    Beta,
    Bool,
    ChunkLength,
    Fraction,
    MicroBatchRows,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Seed,
    Text,
    to_amp,
    to_checkpointing,
    to_count_or,
    to_data_path,
    to_switch_or,
    to_text,
)


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class ValidationSection(Section):
    """Held-out text, from one of two places."""

    path: Text | None = Field(None, description="JSONL file, directory or glob of its own.")
    fraction: OpenFraction | None = Field(
        None, description="Share of the documents of data.path: its last ones, which are then not trained on."
    )


class MixtureSource(Section):
    """One source of a mixture."""

    path: Text = Field(description="As data.path, one path.")
    weight: PositiveFloat = Field(description="Its part of the tokens, relative to the other weights.")


class DataSection(Section):
    """Text, or token ids, and how they become rows of tokens."""

    path: Annotated[str | list[str] | list[MixtureSource], BeforeValidator(to_data_path)] = Field(
        description="JSON lines, text or Parquet (plain, gzip or zstd) or token ids (.npy, .bin): a file, a "
        "directory, a glob, a list of those, or a mixture [{path, weight}] by tokens."
    )
    text_column: Text = Field("text", description="Key of the text; a.b reaches into nested objects.")
    max_length: ChunkLength = Field(2048, description="Tokens in a chunk.")
    packing: Bool = Field(
        True,
        description="true: documents are concatenated and cut into chunks of max_length. "
        "false: one document per row, cut or padded to max_length; padding is never a target.",
    )
    add_bos: Bool = Field(False, description="Put one BOS token before each document.")
    add_eos: Bool = Field(True, description="Put one EOS token after each document.")
    on_bad_line: Literal["error", "skip"] = Field(
        "error",
        description="What to do with a line that is not a JSON object holding text: stop, or skip and count.",
    )
    validation: ValidationSection | None = Field(
        None, description="Held-out data, {path} or {fraction}, evaluated every training.eval_steps."
    )
    shuffle: Bool = Field(
        True, description="Another random order of rows in each epoch; false: the order of the files."
    )
    document_mask: Bool = Field(
        False,
        description="No attention and no target across documents of a packed row. "
        "Refused for models that carry state from one to the next.",
    )
    token_dtype: Literal["uint16", "uint32"] | None = Field(
        None, description="Size of the ids in raw .npy and .bin files. Default: as the table beside a .npy says."
    )
    cache_dir: Text | None = Field(None, description="Token cache. Default: the user's cache directory.")
    verify: Literal["mtime", "content"] = Field(
        "mtime",
        description="What the cache knows a file by: path, size and modification time, or its content "
        "(read at each start).",
    )
    num_workers: Annotated[Literal["auto"] | int, BeforeValidator(to_count_or("auto"))] = Field(
        "auto", description="Tokenising processes. auto: one a core, or one for a corpus below 16 MiB."
    )


class TrainingSection(Section):
    """The optimisation: how long, how big a step, how precise."""

    max_steps: PositiveInt = Field(description="Optimiser steps to run.")
    batch_size: MicroBatchRows = Field(2, description="Rows in a micro-batch, per process.")
    grad_accum_steps: PositiveInt = Field(1, description="Micro-batches per optimiser step.")
    global_batch_size: PositiveInt | None = Field(
        None, description="Rows per step over all processes; sets grad_accum_steps for any world size."
    )
    lr: NonNegativeFloat = Field(3e-4, description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(
        0.1, description="AdamW decay; never applied to 1-D parameters or those marked _no_weight_decay."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW beta1 and beta2.")
    eps: PositiveFloat = Field(1e-8, description="AdamW epsilon.")
    max_grad_norm: PositiveFloat | None = Field(
        1.0, description="Gradients are scaled down to this global L2 norm; null: measured, never scaled."
    )
    scheduler: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Learning rate after warm-up. wsd: constant, then linear decay over the last fifth.",
    )
    warmup_steps: NonNegativeInt = Field(0, description="Steps of linear warm-up: step k uses lr * k / warmup_steps.")
    min_lr_ratio: Fraction = Field(0.0, description="Learning rate at the last step as a fraction of the peak.")
    log_steps: PositiveInt = Field(10, description="Steps between log lines.")
    save_steps: PositiveInt = Field(500, description="Steps between checkpoints; the last step is always saved.")
    keep_checkpoints: Annotated[Literal["all"] | int, BeforeValidator(to_count_or("all"))] = Field(
        "all", description="How many checkpoints to keep; older ones are removed once a newer one is complete."
    )
    async_checkpoint: Bool = Field(
        False,
        description="Copy the state and go on training while a checkpoint is written; needs memory for the copy.",
    )
    max_minutes: PositiveFloat | None = Field(
        None,
        description="Save and stop (exit code 75) this many minutes after the start of the command.",
    )
    eval_steps: PositiveInt | None = Field(
        None, description="Steps between evaluations on data.validation, and at the last step. Default: save_steps."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Precision. Default: bfloat16, or float32 when the model holds FFT blocks."
    )
    amp: Annotated[bool | Literal["selective"] | None, BeforeValidator(to_amp)] = Field(
        None,
        description="Autocast the forward pass. selective: to bfloat16, but FFT blocks stay in float32 "
        "(dtype: float32). Default: true for bfloat16 and float16, else false.",
    )
    master_weights: Annotated[bool | Literal["auto"], BeforeValidator(to_switch_or("auto"))] = Field(
        "auto",
        description="dtype: bfloat16 only. true: float32 weights and optimiser state. false: all in bfloat16, "
        "updated with stochastic rounding. auto: float32 where it fits into memory.",
    )
    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="adamw8bit: moments in 8 bits. muon: orthogonalised updates for the matrices inside blocks, "
        "AdamW for all else.",
    )
    precision_check: Literal["error", "warn"] = Field(
        "error", description="What to do when dtype/amp would run FFT blocks below float32."
    )
    memory_check: Literal["error", "warn"] = Field(
        "error", description="What to do when the memory forecast is more than what is free."
    )
    seed: Seed = Field(42, description="All randomness: initial weights, dropout, order of the data.")
    activation_checkpointing: Annotated[bool | int, BeforeValidator(to_checkpointing)] = Field(
        False,
        description="Recompute activations in the backward pass instead of keeping them. true: of every block; N: of "
        "every N-th block.",
    )
    compile: Bool = Field(False, description="torch.compile each block.")
    use_model_hints: Bool = Field(
        False,
        description="Take lr, betas, max_grad_norm and min_lr_ratio from the model's config.json "
        "where the preset leaves them unset (EulerStack writes them).",
    )


class DistributedSection(Section):
    """How several processes share the work."""

    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="ddp: whole model on each process; fsdp: sharded. auto: ddp when the model's state fits "
        "comfortably in a device's memory, else fsdp. One process needs none.",
    )
    nproc_per_node: Annotated[Literal["auto"] | int, BeforeValidator(to_count_or("auto"))] = Field(
        "auto", description="Processes per machine. auto: one per visible GPU with device cuda, else one."
    )
    replicate: PositiveInt = Field(
        1, description="fsdp: replicas of the model, each sharded over world size / replicate processes (HSDP)."
    )
    timeout_seconds: PositiveFloat = Field(
        1800.0, description="After this long a collective that some process does not join ends the run."
    )


class PretrainPreset(Section):
    """A preset of `eulerforge pretrain`."""

    device: Annotated[str, Field(pattern=r"^(cuda|cpu|cuda:[0-9]{1,3})$"), BeforeValidator(to_text)] = Field(
        "cuda",
        description="cuda, cuda:N or cpu. cuda without a visible GPU falls back to cpu with a warning.",
    )
    model_dir: Text = Field(description="HF model directory: config.json, maybe custom code, maybe weights.")
    trust_remote_code: Bool = Field(False, description="Allow the model directory's own Python code to run.")
    tokenizer: Text | None = Field(None, description="HF name or path. Default: the model directory's tokenizer.")
    output_dir: Text | None = Field(
        None,
        description="Run directory, new or empty without --resume. Default: outputs/pretrain_YYYYmmdd_HHMMSS.",
    )
    data: DataSection
    training: TrainingSection
    distributed: DistributedSection = Field(default_factory=lambda: DistributedSection())


def json_schema() -> dict[str, Any]:
    """The preset's JSON Schema (draft 2020-12), for editors and for `eulerforge schema`."""
    schema = PretrainPreset.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "EulerForge pretrain preset",
    }
