"""`python -m benchmarks`: run all benchmarks and print their tables."""

from __future__ import annotations

from benchmarks import (
    checkpoint_saves,
    memory_forecast,
    precision,
    sharded_start_memory,
    tokenizing,
    train_throughput,
)

if __name__ == "__main__":
    train_throughput.main()
    sharded_start_memory.main()
    checkpoint_saves.main()
    tokenizing.main()
    precision.main()
    memory_forecast.main()
