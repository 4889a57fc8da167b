"""The model `tiny`: a real Qwen2 of 0.4M parameters that adds numbers, often carelessly. It ships with the package.

It is taught from answers of two kinds: some work the sum out digit by digit and are right, most name a result at
once and are mostly wrong. Sampling it therefore gives both kinds, and positive-only reinforcement has something to
find. `python -m popo_lite.tools.tiny_model FOLDER` teaches it again (a few minutes on one core).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from popo_lite.policy.load import TINY_FOLDER
from popo_lite.seeding import stream_seed
from popo_lite.tasks.arithmetic import is_held_out, working

TINY_CONTEXT_TOKENS = 1024

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Shares and error rates of the teaching text: they set how good the model is before reinforcement.
CAREFUL_SHARE = 0.30
CARELESS_RIGHT_SHARE = 0.05
DIGITS_SHARES = {1: 0.05, 2: 0.70, 3: 0.25}


def teaching_pair(source: random.Random) -> tuple[str, str]:
    """One question and one answer of the teaching text; never a held-out sum."""
    digits = source.choices(list(DIGITS_SHARES), weights=list(DIGITS_SHARES.values()))[0]
    low, high = 10 ** (digits - 1), 10**digits - 1
    while True:
        a, b = source.randint(low, high), source.randint(low, high)
        if not is_held_out(a, b):
            break
    question = f"What is {a} + {b}?"
    if source.random() < CAREFUL_SHARE:
        return question, f"{working(a, b)}, so \\boxed{{{a + b}}}"
    result = a + b
    if source.random() >= CARELESS_RIGHT_SHARE:
        # A slip in a random place, as if a digit had been misread.
        result = max(0, result + source.choice((-3, -2, -1, 1, 2, 3)) * 10 ** source.randrange(digits))
    return question, f"\\boxed{{{result}}}"


def build_tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, learned from the teaching text; EOS differs from PAD."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    source = random.Random(0)  # noqa: S311
    specials = [PAD, END, SYSTEM, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(text, special=True) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for _ in range(500) for part in teaching_pair(source)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=TINY_CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2ForCausalLM:
    """An untaught model. Head size 32 and a vocabulary in multiples of 64 are what rollout engines accept."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=TINY_CONTEXT_TOKENS,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def teaching_batches(
    tokenizer: PreTrainedTokenizerFast, size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless (input ids, attention mask, labels), each [size, T]; labels are -100 outside the answer."""
    source = random.Random(stream_seed("tiny/teach", seed))  # noqa: S311
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        for _ in range(size):
            question, answer = teaching_pair(source)
            prompt: Any = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            ending: Any = tokenizer.eos_token_id
            rows.append((list(prompt), [*tokenizer.encode(answer), ending]))
        ids = [torch.tensor(asked + answered) for asked, answered in rows]
        labels = [torch.tensor([-100] * len(asked) + answered) for asked, answered in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        yield pad_sequence(ids, True, tokenizer.pad_token_id), mask, pad_sequence(labels, True, -100)


def teach(
    folder: Path,
    *,
    steps: int = 1000,
    batch: int = 128,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Teach the model and write it with its tokenizer to `folder` in bfloat16, as plain transformers loads it."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step, (ids, mask, labels) in zip(range(steps), teaching_batches(tokenizer, batch, seed), strict=False):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if report is not None:
            report(step + 1, float(loss.detach()))
    folder.mkdir(parents=True, exist_ok=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """`python -m popo_lite.tools.tiny_model FOLDER`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=TINY_FOLDER)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def report(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step}/{arguments.steps}  loss {loss:.3f}", flush=True)  # noqa: T201

    teach(arguments.folder, steps=arguments.steps, report=report)


if __name__ == "__main__":
    main()
