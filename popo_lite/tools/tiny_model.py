"""The model `tiny`: a real Qwen2 of 0.4M parameters that adds numbers, often carelessly. It ships with the package.

It is taught from answers of two kinds: some work the sum out digit by digit and are right, most name a result at
once and are mostly wrong. Sampling it therefore gives both kinds, and positive-only reinforcement has something to
find. `python -m popo_lite.tools.tiny_model FOLDER` teaches it again (a few minutes on one core).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from popo_lite.policy.load import TINY_FOLDER
from popo_lite.seeding import stream_seed
from popo_lite.tasks.generated import is_held_out

TINY_CONTEXT_TOKENS = 1024
PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
TeachingPair = Callable[[random.Random], tuple[str, str]]
"""Returns a question and an answer of a teaching text."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Shares and error rates of the teaching text: they set how good the model is before reinforcement.
CAREFUL_SHARE = 0.30
CARELESS_RIGHT_SHARE = 0.05
DIGITS_SHARES = {1: 0.05, 2: 0.70, 3: 0.25}


def working(a: int, b: int) -> str:
    """Return the column addition, lowest digit first: `7+5=12, 1+2+1=4`."""
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ", ".join(steps)


def teaching_pair(source: random.Random) -> tuple[str, str]:
    """Return a question and an answer of the teaching text; never a held-out sum."""
    digits = source.choices(list(DIGITS_SHARES), weights=list(DIGITS_SHARES.values()))[0]
    low, high = 10 ** (digits - 1), 10**digits - 1
    a, b = source.randint(low, high), source.randint(low, high)
    while is_held_out("arithmetic", a, b):
        a, b = source.randint(low, high), source.randint(low, high)
    question, result = f"What is {a} + {b}?", a + b
    if source.random() < CAREFUL_SHARE:
        return question, f"{working(a, b)}, so \\boxed{{{result}}}"
    if source.random() >= CARELESS_RIGHT_SHARE:
        # A slip in a random place, as if a digit had been misread.
        result = max(0, result + source.choice((-3, -2, -1, 1, 2, 3)) * 10 ** source.randrange(digits))
    return question, f"\\boxed{{{result}}}"


def build_tokenizer(pair: TeachingPair = teaching_pair, tokens: int = 320) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with single digits, learned from the teaching text; EOS differs from PAD."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    source = random.Random(0)  # noqa: S311
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=[AddedToken(text, special=True) for text in (PAD, END, SYSTEM, USER, ASSISTANT)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for _ in range(500) for part in pair(source)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=TINY_CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def teaching_batch(
    tokenizer: PreTrainedTokenizerFast, size: int, source: random.Random, pair: TeachingPair = teaching_pair
) -> dict[str, torch.Tensor]:
    """Return input ids and labels, each [size, T]; labels are -100 outside the answer. Causality hides the padding."""
    ids, labels = [], []
    for question, answer in (pair(source) for _ in range(size)):
        turns = [{"role": "user", "content": question}]
        prompt: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        answered = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + answered))
        labels.append(torch.tensor([-100] * len(prompt) + answered))
    padded = pad_sequence(ids, True, tokenizer.pad_token_id)
    return {"input_ids": padded, "labels": pad_sequence(labels, True, -100)}


def teach(
    folder: Path, *, pair: TeachingPair = teaching_pair, tokens: int = 320, steps: int = 1000, batch: int = 128
) -> list[float]:
    """Teach a new model, write it and its tokenizer to `folder` in bfloat16, and return the loss of each step."""
    tokenizer = build_tokenizer(pair, tokens)
    # Head size 32 and a vocabulary in multiples of 64 are what rollout engines accept.
    config = Qwen2Config(
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
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    source, losses = random.Random(stream_seed("tiny/teach", 0)), []  # noqa: S311
    for step in range(steps):
        loss = model(**teaching_batch(tokenizer, batch, source, pair)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            click.echo(f"step {step + 1}/{steps}  loss {losses[-1]:.3f}")
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=TINY_FOLDER)
@click.option("--steps", default=1000)
def main(folder: Path, steps: int) -> None:
    """`python -m popo_lite.tools.tiny_model FOLDER`."""
    torch.set_num_threads(1)
    teach(folder, steps=steps)


if __name__ == "__main__":
    main()
