"""What influence on a language model costs, in forward passes over the same texts, and how much of the machine it uses.

    python benchmarks/language_speed.py --size tiny                         texts of 128 tokens on one core, minutes
    python benchmarks/language_speed.py --size small --samples 64           a few minutes of one core
    python benchmarks/language_speed.py --size 0.5b --device cuda --dtype bfloat16 --samples 5000 --length 512 --batch-size 16
    python benchmarks/language_speed.py --table                             the table of what has been run

A model of the shape of Qwen2 with random weights and LoRA of rank 8 on the queries' and values' matrices, in float32 on whatever base; seeded random
tokens, all of them learnt. Measured on the same samples, one after another: the forward pass, which is the floor; IP; IP with layers of equal weight;
DataInf; the pairs with the queries, as products and with layers of equal weight; and, on a CPU, what a loop of one backward pass per sample and
captum's TracInCP take. The target is the mean loss of the queries. A time is that of one call from start to end, its gradient of the target and its
checks of the layer rules included: processor time on a CPU, wall time between two synchronisations on a GPU, after one call on a few samples.

The share of the peak counts 2 · parameters · tokens operations for one forward pass, whatever a method does with them; the peak is ``--peak-tflops``,
or that of a large matrix product of the model's type in the same run. Memory is the most that was allocated on the GPU, or what the process grew by.
Each (size, device, method, …) is appended to ``benchmarks/results/language_speed.jsonl``; finished ones are not run again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import robust_if as rif
from robust_if.formats.parts import require
from robust_if.pairs import pairwise

RESULTS = Path(__file__).parent / "results" / "language_speed.jsonl"
#: Samples of the single backward passes and of captum, whose time grows with the number alone, and of a method's first call.
FEW, WARM = 32, 8


@dataclass(frozen=True)
class Shape:
    """A configuration of Qwen2; the two large ones are those of the published models of 0.5 and 1.5 billion parameters."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


SIZES = {
    "tiny": Shape(4000, 128, 352, 4, 4, 2),
    "small": Shape(16000, 384, 1024, 8, 6, 2),
    "0.5b": Shape(151936, 896, 4864, 24, 14, 2),
    "1.5b": Shape(151936, 1536, 8960, 28, 12, 2),
}


class Tokenizer:
    """As much of a tokenizer as a task looks at; the tokens are drawn."""

    pad_token_id = eos_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def made(size: str, device: str, dtype: torch.dtype, length: int) -> rif.Task:
    """The model with its adapter, whose second matrix is drawn too, since half of the gradients are 0 at its usual start."""
    transformers, peft = require("transformers", "a transformer", "'robust-if[hf]'"), require("peft", "LoRA", "'robust-if[hf]'")
    torch.manual_seed(0)
    shape = asdict(SIZES[size])
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.Qwen2Config(**shape, max_position_embeddings=length, tie_word_embeddings=True, use_cache=False, **ids)
    model = transformers.Qwen2ForCausalLM(config).to(device, dtype)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).eval()
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = value.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.02)
    return rif.Task.from_transformers(model, Tokenizer(shape["vocab_size"]), kind="causal-lm")


def texts(count: int, length: int, vocabulary: int, seed: int) -> rif.Samples:
    """Random tokens, all of them learnt."""
    tokens = torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return rif.Samples((tokens, tokens.clone()))


@dataclass(frozen=True)
class Bench:
    """The model, the data, and how they are passed over."""

    task: rif.Task
    train: rif.Samples
    queries: rif.Samples
    batch_size: int

    @property
    def device(self) -> torch.device:
        return next(iter(self.task.params().values())).device

    def take(self, count: int) -> Bench:
        """The same with the first samples and as few queries."""
        train, queries = (data.take(np.arange(min(count, len(data)))) for data in (self.train, self.queries))
        return Bench(self.task, train, queries, min(self.batch_size, count))

    def batches(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, len(self.train), size):
            yield tuple(leaf.to(self.device) for leaf in self.train.batch(slice(start, start + size)))

    def target(self) -> rif.Utility:
        return rif.Utility(self.queries, batch_size=self.batch_size)


def forward(bench: Bench) -> None:
    """The losses of all samples."""
    params = bench.task.params()
    with torch.no_grad():
        for batch in bench.batches(bench.batch_size):
            bench.task.losses(params, batch)


def scored(estimator: rif.InnerProduct) -> Callable[[Bench], Any]:
    """One call of ``score``."""
    return lambda bench: rif.score(bench.task, bench.train, target=bench.target(), estimator=estimator, batch_size=bench.batch_size)


def paired(normalise: Any) -> Callable[[Bench], Any]:
    """The matrix of all samples with all queries."""
    return lambda bench: pairwise(bench.task, bench.train, bench.queries, normalise=normalise, sweep=rif.Sweep(batch_size=bench.batch_size))


def single(bench: Bench) -> None:
    """One forward and one backward pass for each sample and their products with a vector, as in a plain loop."""
    params = {name: value.requires_grad_() for name, value in bench.task.params().items()}
    vector = [torch.randn_like(value) for value in params.values()]
    for batch in bench.batches(1):
        grads = torch.autograd.grad(bench.task.losses(params, batch).sum(), list(params.values()))
        torch.stack([(g * v).sum() for g, v in zip(grads, vector, strict=True)]).sum().item()


def captum(bench: Bench) -> None:
    """TracInCP over the adapter at one checkpoint; the gradients of the queries are summed first."""
    from captum.influence import TracInCP  # type: ignore[import-not-found,import-untyped,unused-ignore]

    task = bench.task

    class Losses(torch.nn.Module):
        """The losses as the outputs, since captum hands on nothing but the outputs and the labels."""

        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def forward(self, tokens: Tensor) -> Tensor:
            return task.loss(task.forward(self.model, (tokens, tokens)), (tokens, tokens))

    def given(outputs: Tensor, _: Tensor) -> Tensor:
        return outputs

    model = Losses()
    layers = [f"model.{name.rpartition('.')[0]}" for name in task.params()]
    kept = {name: value.requires_grad for name, value in model.named_parameters()}
    try:
        for name, value in model.named_parameters():
            value.requires_grad_(name.removeprefix("model.") in task.params())
        given.reduction = "none"  # type: ignore[attr-defined]
        data = torch.utils.data.TensorDataset(bench.train.batch(slice(None))[0].to(bench.device), torch.zeros(len(bench.train)))
        tracer = TracInCP(model, data, ["only"], lambda *_: 1.0, layers, given, bench.batch_size)
        queries = bench.queries.batch(slice(None))[0].to(bench.device)
        tracer.influence((queries, torch.zeros(len(queries), device=bench.device)), aggregate=True)
    finally:
        for name, value in model.named_parameters():
            value.requires_grad_(kept[name])


METHODS: dict[str, Callable[[Bench], Any]] = {
    "forward": forward,
    "ip": scored(rif.InnerProduct()),
    "ip-layer": scored(rif.InnerProduct(normalise="layer")),
    "datainf": scored(rif.InnerProduct(rif.DataInf())),
    "pairwise": paired("none"),
    "pairwise-layer": paired("layer"),
}
#: Others, on a few samples of a CPU run; their time is scaled to all.
PEERS: dict[str, Callable[[Bench], Any]] = {"loop of single backward passes": single, "captum TracInCP": captum}


def measured(function: Callable[[Bench], Any], bench: Bench) -> tuple[float, int]:
    """Seconds and bytes of one call, after one on a few samples."""
    function(bench.take(WARM))
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        function(bench)
        torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated()
    before = resident(reset=True)
    began = time.process_time()
    function(bench)
    return time.process_time() - began, resident("VmHWM") - before


def resident(what: str = "VmRSS", *, reset: bool = False) -> int:
    """Bytes of memory of this process, now or at most since the last ``reset``; 0 where the system (any but Linux) does not say."""
    if not sys.platform.startswith("linux"):
        return 0
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter() if device.type == "cuda" else time.process_time()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() if device.type == "cuda" else time.process_time()) - began)
    return 2 * size**3 / best


def run(options: argparse.Namespace) -> None:
    """What is missing, one line each."""
    dtype = getattr(torch, options.dtype)
    setting = {name: getattr(options, name) for name in ("size", "device", "dtype", "samples", "length", "queries", "batch_size")}
    known = [each for each in rows() if all(each[name] == value for name, value in setting.items())]
    peers = PEERS if options.device == "cpu" else {}
    missing = [name for name in (*METHODS, *peers) if name not in {each["method"] for each in known}]
    if not missing:
        return
    task = made(options.size, options.device, dtype, options.length)
    vocabulary, parameters = SIZES[options.size].vocab_size, sum(value.numel() for value in task.model.parameters())
    bench = Bench(
        task, texts(options.samples, options.length, vocabulary, 1), texts(options.queries, options.length, vocabulary, 2), options.batch_size
    )
    tokens = options.samples * options.length
    top = options.peak_tflops * 1e12 if options.peak_tflops else peak(bench.device, dtype)
    floor = min(measured(forward, bench)[0] for _ in range(2))  # in the same run as what is divided by it
    for name in missing:
        # one query, so that what is scaled is the samples' part
        part = bench if name in METHODS else replace(bench.take(FEW), queries=bench.queries.take(np.arange(1)))
        seconds, size = measured(METHODS[name] if name in METHODS else peers[name], part)
        seconds *= options.samples / len(part.train)
        found = {
            **setting,
            "method": name,
            "seconds": round(seconds, 3),
            "forwards": round(seconds / floor, 2),
            "tokens_per_second": round(tokens / seconds),
            "peak_share": round(2 * parameters * tokens / seconds / top, 4),
            "peak_tflops": round(top / 1e12, 3),
            "bytes": size,
            "parameters": parameters,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


def rows() -> list[dict[str, Any]]:
    """What has been run."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def table() -> str:
    """One line for each method of each setting."""
    lines = ["| model | texts | method | tokens / s | forward passes | share of the peak | memory |", "|---|---|---|---|---|---|---|"]
    for each in map(_row, rows()):
        lines.append("| " + " | ".join(each) + " |")
    return "\n".join(lines)


def _row(each: Mapping[str, Any]) -> tuple[str, ...]:
    texts = f"{each['samples']} × {each['length']}, {each['queries']} queries, batches of {each['batch_size']}"
    return (
        f"{each['size']} ({each['parameters'] / 1e6:,.0f} M), {each['dtype']}, {each['device']}",
        texts,
        each["method"],
        f"{each['tokens_per_second']:,}",
        f"{each['forwards']:.2f}",
        f"{100 * each['peak_share']:.0f} %",
        f"{each['bytes'] / 1e6:,.0f} MB",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base; the adapter is float32")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--peak-tflops", type=float, help="of the device; measured by default")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        run(options)
    print(table())


if __name__ == "__main__":
    main()
