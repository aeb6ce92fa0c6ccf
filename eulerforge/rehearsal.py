"""What a training would decide, without weights, data or a run directory: the last part of `--validate-only`."""

from __future__ import annotations

import torch

from eulerforge.config.checks import grad_accum_steps
from eulerforge.distributed.context import ProcessContext
from eulerforge.distributed.parallelize import free_memory
from eulerforge.metrics.console import Console
from eulerforge.models.tokenizer import load_tokenizer
from eulerforge.preflight import Preflight, precision_request
from eulerforge.train.decide import ModelRequest, decide


def rehearse(flight: Preflight, device: str, world_size: int, local_processes: int, console: Console) -> None:
    """Build the model without memory, and print precision, strategy and memory forecast.

    Args:
        device: as the launch plan has it; `cuda` on a machine without GPUs is planned for all the same.
        local_processes: of them on this machine.

    Raises:
        InputError: model or tokenizer cannot be built, the blocks do not bear the precision, or it does not fit.
    """
    preset = flight.preset
    tokenizer = load_tokenizer(
        flight.corpus.tokenizer, preset.trust_remote_code, preset.data.add_bos, preset.data.add_eos
    )
    here = torch.device(device)
    context = ProcessContext(0, world_size, 0, 0, here, None)
    request = ModelRequest(
        flight.directory,
        flight.blocks,
        precision_request(preset),
        preset,
        tokenizer,
        context,
        console,
        grad_accum_steps(preset, world_size),
    )
    known = here.type == "cpu" or torch.cuda.is_available()
    decide(request, request.build_skeleton(), free_memory(here, local_processes) if known else None)
