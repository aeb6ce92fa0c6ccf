"""Tokenising throughput and memory of `eulerforge prepare`, and what a warm cache costs at the start.

The corpus is this Python's documentation, its paragraphs drawn again and again into documents of random length; the
tokenizer is a byte-level BPE trained on it. Throughput is compared, in turns and on the same texts, with the
tokenizers library's own `encode_batch_fast` on texts that are in memory already, and with a loop that encodes text by
text.

    python -m benchmarks.tokenizing [MB of text for throughput] [MB of text for memory]
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from benchmarks.inputs import environment, write_inputs

ROUNDS = 3
VOCABULARY = 16384
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
IMPORTS = "eulerforge.corpus, eulerforge.metrics.progress, eulerforge.models.tokenizer, transformers, torch"
WORKER_IMPORTS = "eulerforge.data.workers, tokenizers"


def main(throughput_mb: int = 100, memory_mb: int = 1000) -> None:
    """Run all and print the tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preset = {
            "data": {"max_length": 256},
            "training": {"max_steps": 1000, "log_steps": 1, "dtype": "float32", "amp": False, "batch_size": 8},
        }
        write_inputs(folder, MODEL, VOCABULARY, preset)
        write_large(folder / "corpus.jsonl", folder / "large.jsonl", throughput_mb)
        _compare(folder, throughput_mb)
        write_large(folder / "corpus.jsonl", folder / "large.jsonl", memory_mb)
        _measure_memory(folder, memory_mb)


def write_large(source: Path, target: Path, megabytes: int) -> None:
    """Paragraphs of `source`, drawn with a fixed seed, as JSON lines."""
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    draw = random.Random(0)
    size = 0
    with target.open("w", encoding="utf-8") as sink:
        while size < megabytes * 1e6:
            chosen = draw.choices(paragraphs, k=draw.randint(1, 40))
            size += sink.write(json.dumps({"id": size, "text": "\n\n".join(chosen)}) + "\n")


def _compare(folder: Path, megabytes: int) -> None:
    ways = ("prepare", "batch", "loop")
    seen: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way in ways:
            if way == "prepare":
                seen[way].append(_prepare(folder)[0])
            else:
                command = [sys.executable, "-m", "benchmarks.tokenizing", way, str(folder)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
                seen[way].append(float(done.stdout.splitlines()[-1]))
    median = {way: statistics.median(values) for way, values in seen.items()}
    print(
        f"Tokenising {megabytes} MB of JSON lines, BPE of {VOCABULARY}, {psutil.cpu_count()} cores, {ROUNDS} rounds:"
    )
    for way, what in (
        ("prepare", "eulerforge prepare, from disk to cache"),
        ("batch", "encode_batch_fast, texts in memory"),
        ("loop", "encode, text by text, texts in memory"),
    ):
        print(f"  {what:<40} {median[way]:>12,.0f} tokens/s")
    print(f"  ratio to encode_batch_fast {median['prepare'] / median['batch']:.2f}, to the loop ", end="")
    print(f"{median['prepare'] / median['loop']:.2f}")


def _prepare(folder: Path) -> tuple[float, dict[str, float]]:
    """Tokens per second of a build from nothing, and the peak memory of each of its processes in MiB."""
    cache = Path(tempfile.mkdtemp(dir=folder)) / "cache"
    values = yaml.safe_load((folder / "preset.yml").read_text())
    values["data"] |= {"path": str(folder / "large.jsonl"), "cache_dir": str(cache)}
    (folder / "large.yml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "eulerforge", "prepare", "--preset", str(folder / "large.yml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    with _watching(process.pid) as peaks:
        out, _ = process.communicate()
    assert process.returncode == 0, out
    tokens, seconds = re.findall(r"([\d,]+) tokens in ([\d.]+)s", out)[0]
    return int(tokens.replace(",", "")) / float(seconds), peaks


@contextlib.contextmanager
def _watching(pid: int) -> Iterator[dict[str, float]]:
    """Yields the peak resident memory, in MiB, of a process and its workers, filled while the block runs."""
    peaks: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            with contextlib.suppress(psutil.Error):
                parent = psutil.Process(pid)
                for process in (parent, *parent.children(recursive=True)):
                    name = "parent" if process.pid == pid else f"worker {process.pid}"
                    if name == "parent" or "spawn_main" in " ".join(process.cmdline()):
                        peaks[name] = max(peaks.get(name, 0.0), process.memory_info().rss / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def _measure_memory(folder: Path, megabytes: int) -> None:
    _, peaks = _prepare(folder)
    base = {name: _imports(modules) for name, modules in (("parent", IMPORTS), ("worker", WORKER_IMPORTS))}
    print(f"Peak resident memory of prepare on {megabytes} MB of JSON lines, above the imports:")
    for name, peak in peaks.items():
        imports = base[name.split()[0]]
        print(f"  {name.split()[0]:<8} {peak - imports:>6,.0f} MiB (imports {imports:,.0f} MiB)")
    seconds, sizes = _train(folder)
    print(f"Warm cache: {seconds:.2f} s from the loaded model to the end of the first step")
    print("Resident memory while training on it:", end=" ")
    print(", ".join(f"{size:,.0f} MiB after {step} steps" for step, size in sizes.items()))


def _train(folder: Path) -> tuple[float, dict[int, float]]:
    """Train on the cache that `_prepare` made last: seconds from the loaded model to the first step's end, and the
    resident memory in MiB by step."""
    command = [sys.executable, "-m", "eulerforge", "pretrain", "--preset", str(folder / "large.yml")]
    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    process = subprocess.Popen(
        [*command, "--output-dir", str(output)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    loaded = first = 0.0
    sizes: dict[int, float] = {}
    for line in process.stdout:
        if "Model loaded" in line:
            loaded = time.monotonic()
        if step := re.search(r"step=(\d+)/", line):
            first = first or time.monotonic()
            if int(step[1]) % 100 == 0:
                sizes[int(step[1])] = psutil.Process(process.pid).memory_info().rss / 2**20
    assert process.wait() == 0
    return first - loaded, sizes


def _imports(modules: str) -> float:
    """Resident memory after importing modules, in MiB."""
    code = f"import {modules}, psutil; print(psutil.Process().memory_info().rss / 2**20)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment())
    return float(done.stdout)


def _texts(folder: Path) -> Iterator[str]:
    with (folder / "large.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _rate(folder: Path, way: str) -> float:
    """Tokens per second of the tokenizers library itself."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    texts = list(_texts(folder))
    start = time.monotonic()
    tokens = 0
    if way == "batch":
        for first in range(0, len(texts), 1000):
            tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts[first : first + 1000]))
    else:
        for text in texts:
            tokens += len(tokenizer.encode(text).ids)
    return tokens / (time.monotonic() - start)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("batch", "loop"):
        sys.stdout.write(f"{_rate(Path(sys.argv[2]), sys.argv[1])}\n")
    else:
        main(*map(int, sys.argv[1:]))
