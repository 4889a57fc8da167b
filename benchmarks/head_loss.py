"""The loss alone, from hidden states to their gradient: time, extra peak memory and gradient error, against rivals.

    python benchmarks/head_loss.py                              V=151,936, D=512, one thread, on a CPU
    python benchmarks/head_loss.py --json                       the same as JSON on the standard output
    python benchmarks/head_loss.py --json benchmarks/results/head_loss-cpu.json
    python benchmarks/head_loss.py --device cuda --shape qwen2.5-1.5b --tokens 4096 --memory-tokens 8192
    python benchmarks/head_loss.py --device cuda --shape qwen2.5-7b --dtype bfloat16 --only naive fused

Every variant runs in a process of its own, in rounds: each round runs every variant once. Synthetic hidden states and
head; every token has its own random coefficients of log-prob and entropy. For a rival without entropy or coefficients
(`gives`) the loss is the sum of log-probs. Ratios are to `naive`: the logits as a model's own head makes them, in
its dtype, and everything after them in float32. `naive_float32_logits` rounds no logits, as popo-lite does not.

Memory is the most that a first pass over --memory-tokens takes beyond inputs and head: on a CPU resident memory, by
the kernel's own high-water mark (Linux), on a GPU what torch allocated. Gradient errors are relative to float64, over
the first --error-tokens tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from popo_lite.fused import Head, fused_loss, naive_logprobs
from popo_lite.run_folder import environment

SHAPES = {
    "bench": (151_936, 512),
    "qwen2.5-1.5b": (151_936, 1536),
    "qwen2.5-7b": (152_064, 3584),
}
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "transformers")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Hidden states [N, D], head [V, D], targets [N], coefficients [N] of log-probs and entropies."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    a: Tensor
    b: Tensor
    chunk: int

    def first(self, tokens: int) -> Inputs:
        """The first `tokens` of them."""
        parts = {name: getattr(self, name)[:tokens] for name in ("hidden", "targets", "a", "b")}
        return Inputs(weight=self.weight, chunk=self.chunk, **parts)

    def total(self, logps: Tensor, entropies: Tensor) -> Tensor:
        """The sum of a log p + b H."""
        return (self.a * logps).sum() + (self.b * entropies).sum()


def from_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies as one writes them down."""
    logp_all = torch.log_softmax(logits.float(), dim=-1)
    return logp_all.gather(-1, targets[:, None]).squeeze(-1), -(logp_all.exp() * logp_all).sum(dim=-1)


def naive(hidden: Tensor, x: Inputs) -> Tensor:
    """All logits in the head's dtype."""
    return x.total(*from_logits(functional.linear(hidden, x.weight), x.targets))


def naive_float32_logits(hidden: Tensor, x: Inputs) -> Tensor:
    """All logits in float32."""
    return x.total(*naive_logprobs(hidden, x.targets, Head(weight=x.weight)))


def checkpointed(hidden: Tensor, x: Inputs) -> Tensor:
    """`naive` in chunks, each recomputed in the backward pass."""

    def piece(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return from_logits(functional.linear(part, x.weight), targets)

    pairs = zip(hidden.split(x.chunk), x.targets.split(x.chunk), strict=True)
    parts = [checkpoint(piece, part, targets, use_reentrant=False) for part, targets in pairs]
    return x.total(*(torch.cat(column) for column in zip(*parts, strict=True)))


def fused(hidden: Tensor, x: Inputs, *, compile_rows: bool = False) -> Tensor:
    """Ours."""

    def token_loss(logps: Tensor, entropies: Tensor, part: slice) -> Tensor:
        return (x.a[part] * logps).sum() + (x.b[part] * entropies).sum()

    head = Head(weight=x.weight)
    return fused_loss(hidden, x.targets, head, token_loss, chunk=x.chunk, compile_rows=compile_rows).loss


def trl_full_logits(hidden: Tensor, x: Inputs) -> Tensor:
    """TRL's functions over all logits."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return x.total(*selective_log_softmax_and_entropy(functional.linear(hidden, x.weight), x.targets))


def trl_fused_head(hidden: Tensor, x: Inputs) -> Tensor:
    """TRL's GRPO trainer as it is: its chunked head, in the tiles it chooses."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logps, entropies, *_ = ChunkedLogProbFunction.apply(
        hidden, x.weight, None, x.targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
    )
    return x.total(logps, entropies)


def liger_cross_entropy(hidden: Tensor, x: Inputs) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy, which chunks by its own rule."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(x.weight, hidden, x.targets)


def liger_grpo(hidden: Tensor, x: Inputs) -> Tensor:
    """Liger-Kernel's fused linear GRPO loss, one sequence of `chunk` tokens at a time, advantage 1, no KL term."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    targets = x.targets.view(-1, x.chunk) if len(x.targets) > x.chunk else x.targets[None]
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", chunk_size=1)
    ones = torch.ones_like(targets)
    found, _ = loss(
        hidden.view(*targets.shape, -1), x.weight, targets, ones, torch.ones(len(targets), device=hidden.device)
    )
    return -found * x.targets.numel()


def torch_linear_cross_entropy(hidden: Tensor, x: Inputs) -> Tensor:
    """Torch's own fused linear cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=x.chunk, chunking_method=None)
    return -functional.linear_cross_entropy(hidden, x.weight, x.targets, reduction="sum", options=options)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """`gives` is what has a gradient; `needs` what must be there beside torch: a package, "cuda", a torch function."""

    total: Callable[..., Tensor]
    gives: str = "log-probs and entropies"
    needs: tuple[str, ...] = ()

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        for need in self.needs:
            if need == "cuda":
                if device != "cuda":
                    return "needs a GPU"
            elif need.startswith("functional."):
                if not hasattr(functional, need.removeprefix("functional.")):
                    return f"torch {torch.__version__} has no {need}"
            elif version(need) is None:
                return "not installed"
        return None


VARIANTS = {
    "naive": Variant(total=naive),
    "naive_float32_logits": Variant(total=naive_float32_logits),
    "checkpointed": Variant(total=checkpointed),
    "fused": Variant(total=fused),
    "fused_compiled": Variant(total=lambda hidden, x: fused(hidden, x, compile_rows=True)),
    "trl_full_logits": Variant(total=trl_full_logits, needs=("trl",)),
    "trl_fused_head": Variant(total=trl_fused_head, needs=("trl", "cuda")),
    "liger_cross_entropy": Variant(total=liger_cross_entropy, gives="sum of log-probs", needs=("liger-kernel", "cuda")),
    "liger_grpo": Variant(total=liger_grpo, gives="sum of log-probs", needs=("liger-kernel",)),
    "torch_linear_cross_entropy": Variant(
        total=torch_linear_cross_entropy, gives="sum of log-probs", needs=("functional.linear_cross_entropy",)
    ),
}
OURS = ("fused", "fused_compiled")


def version(package: str) -> str | None:
    """The installed version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def make(arguments: argparse.Namespace, tokens: int) -> Inputs:
    """The same inputs for every variant; the first tokens do not depend on how many there are."""
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    weight = 0.05 * torch.randn(arguments.vocabulary, arguments.width)
    torch.manual_seed(1)
    a, b = 1e-3 * torch.randn(tokens, 2).T
    torch.manual_seed(2)
    hidden = torch.randn(tokens, arguments.width)
    torch.manual_seed(3)
    targets = torch.randint(arguments.vocabulary, (tokens,))
    device = arguments.device
    return Inputs(
        hidden=hidden.to(device, dtype),
        weight=weight.to(device, dtype),
        targets=targets.to(device),
        a=a.to(device),
        b=b.to(device),
        chunk=arguments.chunk,
    )


def gradient(variant: Variant, x: Inputs) -> Tensor:
    """One forward and backward pass."""
    hidden = x.hidden.clone().requires_grad_()
    variant.total(hidden, x).backward()
    assert hidden.grad is not None
    return hidden.grad


def gradient_error(variant: Variant, x: Inputs) -> float:
    """|g - g64| / |g64| over the tokens of `x`."""
    found = gradient(variant, x).double()
    hidden = x.hidden.double().requires_grad_()
    logps, entropies = naive_logprobs(hidden, x.targets, Head(weight=x.weight.double()))
    (logps.sum() if variant.gives == "sum of log-probs" else x.total(logps, entropies)).backward()
    assert hidden.grad is not None
    return float((found - hidden.grad).norm() / hidden.grad.norm())


def resident_bytes(key: str) -> int:
    """A line of /proc/self/status: VmRSS, or VmHWM, its high-water mark."""
    line = re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def peak_bytes(variant: Variant, x: Inputs) -> int:
    """Most bytes beyond inputs and head while one pass runs."""
    gc.collect()
    if x.hidden.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradient(variant, x)
        return torch.cuda.max_memory_allocated() - before
    # Memory that the allocator keeps from warming up would be used again and not be seen.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    gradient(variant, x)
    return resident_bytes("VmHWM") - before


def seconds(variant: Variant, x: Inputs) -> float:
    """Seconds of one pass, after one that warms up."""
    gradient(variant, x)
    clock = getattr(time, clock_of(x.hidden.device.type, torch.get_num_threads()))
    if x.hidden.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    gradient(variant, x)
    if x.hidden.is_cuda:
        torch.cuda.synchronize()
    return float(clock() - start)


def clock_of(device: str, threads: int) -> str:
    """What takes the time: of one thread its CPU time, as other work on the machine lengthens it less."""
    return "process_time" if device == "cpu" and threads == 1 else "perf_counter"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one process measures of one variant."""
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    name, part = arguments.worker
    variant = VARIANTS[name]
    many, few = make(arguments, arguments.memory_tokens), make(arguments, arguments.tokens)
    gradient(variant, few.first(arguments.chunk))  # imports, compilation
    if part == "seconds":
        more = {"seconds_of_memory_tokens": seconds(variant, many)} if name in OURS else {}
        return {"seconds": seconds(variant, few), **more}
    return {
        "peak_bytes": peak_bytes(variant, many),
        "peak_bytes_of_tokens": peak_bytes(variant, few),
        "gradient_error": gradient_error(variant, few.first(arguments.error_tokens)),
    }


def worker(arguments: argparse.Namespace, name: str, part: str) -> dict[str, Any]:
    """`measure` in a process of its own; {"failed": the last line of its error} where it fails."""
    settings = ("device", "dtype", "vocabulary", "width", "tokens", "memory_tokens", "error_tokens", "chunk", "threads")
    command = [sys.executable, __file__, "--worker", name, part]
    for setting in settings:
        command += ["--" + setting.replace("_", "-"), str(getattr(arguments, setting))]
    threads = {"OMP_NUM_THREADS": str(arguments.threads)} if arguments.device == "cpu" else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["killed"]
    return json.loads(lines[-1]) if done.returncode == 0 else {"failed": lines[-1]}


def measure_all(arguments: argparse.Namespace, notify: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Every variant of one dtype. The rounds of timings go through all variants, so that a slow minute hits all."""
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.only:
        missing = VARIANTS[name].missing(arguments.device)
        measured = {"missing": missing} if missing else worker(arguments, name, "memory")
        found[name] = {"gives": VARIANTS[name].gives, **measured}
        notify(f"{arguments.dtype} {name}: {json.dumps(found[name])}")
    for round_ in range(arguments.repeats):
        for name, result in found.items():
            if "gradient_error" not in result:
                continue
            for key, value in worker(arguments, name, "seconds").items():
                result.setdefault(key, []).append(value)
            notify(f"{arguments.dtype} round {round_ + 1} {name}: {result['seconds'][-1]:.3f} s")
    base = found.get("naive", {})
    for name, result in found.items():
        if "gradient_error" not in result:
            continue
        result["seconds_median"] = statistics.median(result["seconds"])
        if name in OURS:
            longer = statistics.median(result["seconds_of_memory_tokens"])
            result["seconds_ratio_memory_tokens"] = longer / result["seconds_median"]
        if "gradient_error" in base:
            result["seconds_over_naive"] = result["seconds_median"] / statistics.median(base["seconds"])
            result["peak_bytes_over_naive"] = result["peak_bytes"] / base["peak_bytes"]
    return found


def table(results: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    for dtype, variants in results["dtypes"].items():
        lines.append(f"\n{dtype:28}{'seconds':>9}{'/ naive':>9}{'peak MiB':>10}{'/ naive':>9}{'error':>10}  gives")
        for name, found in variants.items():
            reason = found.get("missing") or found.get("failed")
            if reason:
                lines.append(f"  {name:26}{reason}")
                continue
            time_ratio, peak_ratio = (found.get(f"{key}_over_naive", float("nan")) for key in ("seconds", "peak_bytes"))
            lines.append(
                f"  {name:26}{found['seconds_median']:9.3f}{time_ratio:9.3f}{found['peak_bytes'] / 2**20:10.0f}"
                f"{peak_ratio:9.4f}{found['gradient_error']:10.1e}  {found['gives']}"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, and show or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or show it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="bench", help="vocabulary and width of a model")
    parser.add_argument("--vocabulary", type=int, help="in place of the shape's")
    parser.add_argument("--width", type=int, help="in place of the shape's")
    parser.add_argument("--tokens", type=int, default=1024, help="N for the times")
    parser.add_argument("--memory-tokens", type=int, default=2048, help="N for the peaks")
    parser.add_argument("--error-tokens", type=int, default=64, help="N for the gradient errors")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds; times are their medians")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    vocabulary, width = SHAPES[arguments.shape]
    arguments.vocabulary, arguments.width = arguments.vocabulary or vocabulary, arguments.width or width
    if arguments.worker:
        (arguments.dtype,) = arguments.dtype
        print(json.dumps(measure(arguments)))
        return
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "worker")}
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    clock = clock_of(arguments.device, arguments.threads)
    results: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), **settings, "clock": clock, "dtypes": {}}
    for dtype in settings["dtype"]:
        chosen = argparse.Namespace(**{**vars(arguments), "dtype": dtype})
        results["dtypes"][dtype] = measure_all(chosen, notify=lambda line: print(line, file=sys.stderr, flush=True))
    results["environment"] = environment(torch.device(arguments.device))
    results["environment"]["packages"] |= {package: version(package) for package in PACKAGES}
    written = json.dumps(results, indent=2) + "\n"
    if arguments.json == "-":
        print(written, end="")
        return
    print(table(results))
    if arguments.json:
        Path(arguments.json).write_text(written)


if __name__ == "__main__":
    main()
