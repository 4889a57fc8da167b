"""Check what a run computes, on the GPU or else on the CPU: NF4, packed attention, the compiled loss, an update.

Each result is compared with the same computation in a higher precision. It may be off by a few times as much as plain
torch is in the run's precision, as kernels round at other places. So in float32 small mistakes are found, and in 16 bit
only those that are larger than rounding.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popo_lite.fused import Head, fused_loss, naive_logprobs
from popo_lite.installing import pip
from popo_lite.policy.device import OLDEST_DRIVERS, computes_bfloat16, cuda_problem, pick_device
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.samplers import SamplingParams
from popo_lite.tools.bench import synthetic
from popo_lite.tools.console.words import memory as size
from popo_lite.tools.doctor.findings import REPORT, Finding
from popo_lite.tools.doctor.machine import gpu_users
from popo_lite.tools.doctor.packages import install_command, required
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES
from popo_lite.types import Group, Outcome, Reward, Rollout
from popo_lite.update import Learner

LARGEST_MULTIPLE = 4.0
"""Of plain torch's error in the run's precision."""
SMALLEST_ERROR = 2048 * torch.finfo(torch.float32).eps
"""Relative; an error below it always passes. As `policy.policy._rounding`: what rounding in float32 adds up to."""
NF4_ERROR = (0.07, 0.12)
"""Relative error of normal numbers in NF4 with blocks of 64: 0.094 in theory."""
HEADERS = "Python's header files are missing"
WIDTH, HEADS, KEY_HEADS = 512, 4, 2  # heads of 128, grouped, as in the models of recipes
TORCH = "https://pytorch.org/get-started/locally"
NEIGHBOURS = ("torchvision", "torchaudio")
"""transformers imports them if they are installed, and popo-lite has no use for them."""


def torch_and_gpus() -> Iterator[Finding]:
    """Yield torch's build, then every GPU. The fact "gpus" is how many can be used."""
    build = f"torch {torch.__version__}"
    build += f", built for CUDA {torch.version.cuda}" if torch.version.cuda else ", built without CUDA"
    if getattr(torch.version, "hip", None):
        what = f"{build} but for ROCm: AMD GPUs are not supported"
        yield Finding(
            name="torch", status="failed", what=what, next_step=f"install a CUDA or CPU build of torch: {TORCH}"
        )
        return
    for name in NEIGHBOURS:
        if reason := _import_error(name):
            what = f"{name} does not fit {build}, and transformers imports it: {reason}"
            yield Finding(name="torch", status="failed", what=what, next_step=pip("uninstall", name))
    if problem := cuda_problem():
        yield Finding(name="torch", status="failed", what=problem[0], next_step=problem[1], facts={"gpus": 0})
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield Finding(name="torch", status="ok", what=build, facts={"gpus": count, "cuda": torch.version.cuda})
    if not count:
        what = "not checked: no GPU that torch can use; the checks below run on the CPU"
        yield Finding(name="gpu", status="skipped", what=what)
    pick_device("auto")  # before the first allocation, as in a run: it configures the allocator
    for index in range(count):
        for finding in _gpu(torch.device("cuda", index)):
            if finding.status != "failed" or count == 1:
                yield finding
            elif index == 0:
                next_step = f"{finding.next_step}; or choose another GPU by CUDA_VISIBLE_DEVICES"
                yield replace(finding, next_step=next_step)
            else:
                next_step = f"nothing, as runs use GPU 0; to use this one, {finding.next_step}"
                yield replace(finding, status="warning", next_step=next_step)


def _import_error(name: str) -> str | None:
    """Return why an installed module cannot be imported, or None."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        __import__(name)
    except Exception as error:  # of any type: operators that are registered for another torch
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _gpu(device: torch.device) -> Iterator[Finding]:
    """Yield what a GPU is, what others use of it, and whether it computes."""
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    others = max(0, total - free - CUDA_CONTEXT_BYTES)
    name = f"{device.index}: {properties.name}, compute capability {capability[0]}.{capability[1]}, "
    name += f"{size(free)} of {size(total)} free"
    facts = {"name": properties.name, "capability": capability, "free_bytes": free, "total_bytes": total}
    try:
        product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
        right = bool((product == 64).all())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        needed = OLDEST_DRIVERS.get(int((torch.version.cuda or "0").split(".")[0]), "the newest")
        next_step = f"update the driver to {needed} or newer, or install torch for another CUDA: {TORCH}"
        if "no kernel image" in str(error):
            kinds = " ".join(torch.cuda.get_arch_list())
            reason = f"torch {torch.__version__} has no code for this GPU, only for {kinds}"
            next_step = f"install torch for an older (old GPU) or newer (new GPU) CUDA: {TORCH}"
        yield Finding(
            name="gpu", status="failed", what=f"{name}; it cannot compute: {reason}", next_step=next_step, facts=facts
        )
        return
    if not right:
        what = f"{name}; a product of ones is wrong"
        yield Finding(name="gpu", status="failed", what=what, next_step="test the GPU's memory; reboot", facts=facts)
    elif not computes_bfloat16(device):
        what = f"{name}; it does not compute in bfloat16"
        next_step = "add to every train command: --set model.dtype=float16"
        yield Finding(name="gpu", status="warning", what=what, next_step=next_step, facts=facts)
    else:
        yield Finding(name="gpu", status="ok", what=f"{name}, computes in bfloat16", facts=facts)
    if others > 0.05 * total:
        users = ", ".join(gpu_users(str(getattr(properties, "uuid", ""))))
        what = f"{device.index}: others use {size(others)} of it: "
        what += users or "the desktop, or processes that are not visible from here"
        next_step = "end them, or choose another GPU by CUDA_VISIBLE_DEVICES; " if users else ""
        next_step += "popo-lite plan counts what they use"
        yield Finding(name="gpu", status="warning", what=what, next_step=next_step, facts={"others_bytes": others})


# ---------------------------------------------------------------------- comparing


def run_device() -> tuple[torch.device, torch.dtype]:
    """Return the device that a run takes, and the precision it uses there by default."""
    device = pick_device("auto")
    if device.type == "cpu":
        torch.set_num_threads(1)  # more are slower at the size of the checks
        return device, torch.float32
    return device, torch.bfloat16 if computes_bfloat16(device) else torch.float16


def judge(
    name: str, what: str, found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], next_step: str
) -> Finding:
    """Return whether `found` is about as close to `exact` as `plain` is: the worst of the tensors, by relative norm."""
    errors = [(_error(one, right), _error(twin, right)) for one, twin, right in zip(found, plain, exact, strict=True)]
    bad = [pair for pair in errors if not pair[0] <= max(LARGEST_MULTIPLE * pair[1], SMALLEST_ERROR)]  # NaN is bad
    error, theirs = max(bad or errors, key=lambda pair: pair[0] if math.isfinite(pair[0]) else math.inf)
    facts = {"error": _finite(error), "plain_error": _finite(theirs)}
    said = f"{what}: relative error {error:.1e}, plain torch's {theirs:.1e}"
    if bad:
        return Finding(name=name, status="failed", what=f"{said}, which is too much", next_step=next_step, facts=facts)
    return Finding(name=name, status="ok", what=said, facts=facts)


def _error(found: Tensor, exact: Tensor) -> float:
    exact = exact.double().cpu()
    norm = float(exact.norm())
    # An exact result of nothing but zeros would let everything pass, or nothing.
    return float((found.double().cpu() - exact).norm()) / norm if norm else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _at(device: torch.device, dtype: torch.dtype) -> str:
    return f"on the {'GPU' if device.type == 'cuda' else 'CPU'} in {str(dtype).removeprefix('torch.')}"


# ---------------------------------------------------------------------- NF4


def nf4() -> Iterator[Finding]:
    """Yield whether bitsandbytes' 4-bit layer quantises, multiplies (rows, one row), and passes gradients back."""
    import bitsandbytes as bnb

    device, dtype = run_device()
    version = bnb.__version__
    library: Any = bnb.cextension.lib
    if device.type == "cuda" and not getattr(library, "compiled_with_cuda", False):
        what = f"bitsandbytes {version} has no library for CUDA {torch.version.cuda}, which torch is built for"
        if reason := str(vars(library).get("error_msg", "")).strip():
            what += f": {reason.splitlines()[0]}"
        ours = next(one for one in required() if one.name == "bitsandbytes")
        next_step = f"unset BNB_CUDA_VERSION; {install_command(ours)} --force-reinstall --no-deps"
        yield Finding(name="nf4", status="failed", what=what, next_step=next_step)
        return
    source = torch.Generator().manual_seed(0)
    weight, inputs, direction = (torch.randn(shape, generator=source) for shape in ((384, 512), (32, 512), (32, 384)))
    # Moving it to its device quantises it.
    unquantised: Any = bnb.nn.Params4bit(
        weight.to(device, dtype), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    linear: Any = bnb.nn.Linear4bit
    layer = linear(512, 384, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = quantised = unquantised.to(device)
    stored = bnb.functional.dequantize_4bit(quantised.data, quantised.quant_state).to(dtype)
    rounding = _error(stored, weight)
    if not NF4_ERROR[0] < rounding < NF4_ERROR[1]:
        what = f"bitsandbytes {version} quantises wrongly {_at(device, dtype)}: relative error {rounding:.3g}, not 0.09"
        yield Finding(name="nf4", status="failed", what=what, next_step=REPORT)
        return

    def products(multiply: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        rows = inputs.to(device, dtype).requires_grad_()
        outputs = multiply(rows)
        (gradient,) = torch.autograd.grad((outputs * direction.to(device, dtype)).sum(), rows)
        with torch.no_grad():
            return [outputs.detach(), gradient, multiply(rows.detach()[:1])]  # a single row has a kernel of its own

    found = products(layer, dtype)
    plain = products(lambda rows: rows @ stored.T, dtype)
    exact = products(lambda rows: rows @ stored.double().T, torch.float64) if dtype == torch.float32 else None
    if exact is None:  # operands in 16 bit are exact in float64 too
        rounded = inputs.to(dtype).double().to(device)
        turned = direction.to(dtype).double().to(device)
        wide = stored.double()
        exact = [rounded @ wide.T, turned @ wide, rounded[:1] @ wide.T]
    what = f"bitsandbytes {version} {_at(device, dtype)}, forward and backward"
    yield judge("nf4", what, found, plain, exact, REPORT)


# ---------------------------------------------------------------------- attention


def packed_attention() -> Iterator[Finding]:
    """Yield whether sequences in one row, some with a shared prompt, are computed as each is alone."""
    device, dtype = run_device()
    config = {
        "model_type": "qwen2", "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "vocab_size": 320, "tie_word_embeddings": True,
        "max_position_embeddings": 1024, "eos_token_id": 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="popo-lite-doctor-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        values = {"model.id": folder, "model.quantization": "none", "train.packing": True}
        policy = synthetic.random_policy(_recipe(dtype, **values))
        values |= {"model.dtype": "float32", "model.attn_implementation": "eager", "train.packing": False}
        eager = synthetic.random_policy(_recipe(dtype, **values))
    _move(policy)
    with torch.no_grad():
        theirs = dict(policy.model.named_parameters())
        for name, parameter in eager.model.named_parameters():
            parameter.copy_(theirs[name])
    if policy.packing == "off":
        what = f"no packing {_at(device, dtype)}: {' '.join(policy.notices)}"
        yield Finding(
            name="attention", status="failed", what=what, next_step="--set train.packing=false, and report it"
        )
        return
    # Two sequences, then a prompt of 40 tokens with answers of 30 and 9; once repeated, and once shared.
    row, shared_row = [(130,), (1,), (40, 30), (40, 9)], [(130,), (1,), (40, 30, 9)]
    kept = [*range(201), *range(241, 250)]
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (250,), generator=source)
    ids[201:241] = ids[131:171]
    direction = torch.randn(len(kept), WIDTH, generator=source).to(device)

    def states(one: Policy, row: Sequence[Sequence[int]], given: Tensor, kept: Sequence[int]) -> list[Tensor]:
        one.model.eval()
        parameters = [parameter for _, parameter in one.adapter_parameters()]
        hidden = one.hidden_states(given.to(device), row)[list(kept)]
        gradients = torch.autograd.grad((hidden.float() * direction).sum(), parameters, allow_unused=True)
        return [hidden.detach(), torch.cat([g.flatten().float() for g in gradients if g is not None])]

    exact = states(eager, row, ids, kept)
    kernel, policy.packing = policy.packing, "off"
    plain = states(policy, row, ids, kept)
    policy.packing = kernel
    by = "FlashAttention" if kernel == "varlen" else kernel
    what = f"packed rows by {by} {_at(device, dtype)}, forward and backward"
    next_step = "--set train.packing=false; and report it"
    found = states(policy, row, ids, kept)
    if policy.shared_prefix:
        found += states(policy, shared_row, ids[kept], range(len(kept)))
        plain, exact = [*plain, *plain], [*exact, *exact]
        what += ", prompts shared"
    yield judge("attention", what, found, plain, exact, next_step)


@torch.no_grad()
def _move(policy: Policy) -> None:
    """Move the adapters from where every B is 0: there no gradient would reach an A."""
    source = torch.Generator().manual_seed(0)
    for _, parameter in policy.adapter_parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=source).to(parameter))


def _recipe(dtype: torch.dtype, **values: Any) -> Recipe:
    """Return the recipe `tiny_cpu` on the device of a run, in `dtype`; `values` are keys with other values."""
    dtype_name = str(dtype).removeprefix("torch.")
    return load_recipe("tiny_cpu").with_values({"train.device": "auto", "model.dtype": dtype_name, **values})


# ---------------------------------------------------------------------- an update


def update() -> Iterator[Finding]:
    """Yield whether an update of the model `tiny` is the same packed and one at a time, and moves the weights."""
    device, dtype = run_device()
    checkpointed = {"train.gradient_checkpointing": True, "optimizer.name": "adamw8bit"}
    exact, _ = _step(_recipe(torch.float32, **{"model.attn_implementation": "eager", "train.packing": False}))
    plain, _ = _step(_recipe(dtype, **{"train.packing": False, **checkpointed}))
    found, moved = _step(_recipe(dtype, **checkpointed))
    what = f"a step of the model tiny {_at(device, dtype)}, packed against one at a time"
    finding = judge("update", what, found, plain, exact, "--set train.packing=false; and report it")
    if finding.status == "ok" and not 0 < moved < math.inf:
        finding = replace(
            finding, status="failed", what=f"{what}: the optimizer moved the weights by {moved}", next_step=REPORT
        )
    yield finding


def _step(recipe: Recipe) -> tuple[list[Tensor], float]:
    """Return the gradients and the loss of a step over made-up answers, and how far the optimizer moves the weights."""
    recipe = recipe.with_values({"train.compile_loss": False})  # has a check of its own
    policy = load_policy(recipe)
    _move(policy)
    learner = Learner(recipe, policy, notify=lambda _: None, memory_advice=lambda: "")
    plan = learner.plan(_groups(policy.head.weight.shape[0]))
    assert plan is not None  # noqa: S101  # some answers are right
    targets = learner.siamese_targets(0, plan)
    result = learner.backward(plan, targets, None, entropy_coef=0.01, progress=lambda _: None)
    gradients = [p.grad.flatten().double().cpu() for _, p in policy.trainable_parameters() if p.grad is not None]
    learner.apply(result, learner.prepare(), 1.0)
    assert result.update_norm is not None  # noqa: S101
    release_memory()
    return [torch.cat(gradients), torch.tensor([result.sums["loss"]], dtype=torch.float64)], result.update_norm


def _groups(vocabulary: int) -> list[Group]:
    """Return four prompts with four answers each of unequal lengths, 1 to 4 of them right."""
    groups = []
    for number in range(4):
        prompt = synthetic.random_prompt(number, vocabulary, tokens=8 + 5 * number)
        params = SamplingParams(temperature=1.0, max_completion_length=64)
        [answers] = synthetic.random_answers(vocabulary, [prompt], count=4, params=params)
        rollouts = []
        for index, answer in enumerate(answers):
            tokens = 5 + 11 * index + 3 * number
            cut = replace(answer, token_ids=answer.token_ids[:tokens], sampler_logps=answer.sampler_logps[:tokens])
            right = index <= number
            outcome = Outcome.CORRECT if right else Outcome.INCORRECT
            reward = Reward(value=float(right), outcome=outcome, positive=right)
            rollouts.append(Rollout(prompt=prompt, completion=cut, reward=reward, policy_version=0, index=index))
        groups.append(Group(rollouts=tuple(rollouts)))
    return groups


# ---------------------------------------------------------------------- the compiled loss


def compiled_loss() -> Iterator[Finding]:
    """Yield whether torch.compile works, and gives the loss and gradient that the code gives without it."""
    device, dtype = run_device()
    on_gpu = device.type == "cuda"
    source = torch.Generator().manual_seed(0)
    weight = (torch.randn(2048, 256, generator=source) / 8).to(device, dtype)
    states, targets = torch.randn(64, 256, generator=source), torch.randint(2048, (64,), generator=source).to(device)
    a, b = torch.randn(2, 64, generator=source).to(device)

    def weighted(logps: Tensor, entropies: Tensor, part: slice) -> Tensor:
        return torch.stack([a[part].to(logps) * logps, b[part].to(logps) * entropies]).sum()

    def run(precision: torch.dtype, compiled: bool | None) -> list[Tensor]:
        """Return log-probs, entropies and gradient, by autograd over all logits if `compiled` is None."""
        hidden, head = states.to(device, dtype).to(precision).requires_grad_(), Head(weight=weight.to(precision))
        if compiled is None:
            logps, entropies = naive_logprobs(hidden, targets, head)
            total = weighted(logps, entropies, slice(None))
        else:
            total, logps, entropies = fused_loss(hidden, targets, head, weighted, compile_rows=compiled)
        return [logps.detach(), entropies.detach(), *torch.autograd.grad(total, hidden)]

    try:
        found = run(dtype, True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing or broken compiler raises many types
        lines = [line for line in str(error).splitlines() if line.strip()]
        missing, remedy = missing_tools(on_gpu), REPORT
        reason = missing or (lines[0] if lines else type(error).__name__)
        if missing:
            headers = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
            remedy = f"sudo apt install {headers if HEADERS in missing else 'gcc g++'}"
        next_step = f"{remedy}; or --set train.compile_loss=false"
        what = f"torch.compile does not work: {reason}"
        what += "" if on_gpu else "; a run on the CPU does not need it"
        status: Any = "failed" if on_gpu else "warning"
        yield Finding(name="compiled loss", status=status, what=what, next_step=next_step, facts={"error": lines[-20:]})
        return
    plain, exact = run(dtype, False), run(torch.float64, None)
    what = f"the loss compiled {_at(device, dtype)}"
    yield judge("compiled loss", what, found, plain, exact, "--set train.compile_loss=false; and report it")


def missing_tools(on_gpu: bool) -> str | None:
    """Return which part of a compiler is missing, or None. Triton builds C on GPUs, torch's inductor C++ on CPUs."""
    variable, names = ("CC", ("gcc", "clang")) if on_gpu else ("CXX", ("g++", "clang++"))
    chosen = os.environ.get(variable)
    if chosen and shutil.which(chosen) is None:
        return f"{variable}={chosen} names no program"
    if not chosen and not any(map(shutil.which, names)):
        return f"no {'C' if on_gpu else 'C++'} compiler ({' or '.join(names)}) is on the PATH"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if header.is_file() else f"{HEADERS} ({header})"
