"""The recipe: every setting of a run, its type, range, default and meaning. Free of torch.

This schema is the only place where a setting is documented: `docs/recipes.md`, `recipes/template.toml` and
`popo-lite recipe show` are written from it. Which settings cannot go
together is told by `recipe_rules`; reading files and reporting faults is `recipe_file`'s work.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
ColumnValue = bool | int | float | str


class Section(BaseModel):
    """A table of the recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelRecipe(Section):
    """The base model. It stays frozen; only LoRA adapters and the predictor head are trained."""

    id: str = "tiny"
    """`tiny` (ships with the package), a folder, or a Hub model id such as `Qwen/Qwen2.5-Math-1.5B`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    backend: Literal["transformers", "unsloth"] = "transformers"
    """Library that loads base and adapters. `unsloth` needs a CUDA GPU and the `gpu` extra."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4`: 4-bit NormalFloat by bitsandbytes. `none`: the base stays in `dtype`."""
    double_quantization: bool = True
    """Quantise the NF4 scales too: about 0.4 bits a parameter less."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Compute dtype. Adapters, predictor head and siamese are at least float32 whatever this says."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""


class LoraRecipe(Section):
    """The trainable adapters (PEFT)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank r of the update BA."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with `rslora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in front of A. At 0 the policy that samples is the policy that is trained."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, or a list of module names. The LM head cannot be one of them."""
    rslora: bool = False
    """Rank-stabilised scaling."""
    dora: bool = False
    """Weight-decomposed LoRA."""
    init_from: str | None = None
    """Folder of an adapter (PEFT format) to start from, for a base that rarely answers right."""


class SiameseRecipe(Section):
    """The siamese network: an exponential moving average of adapters and predictor head, in float32."""

    tau: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay per optimizer step: xi <- tau * xi + (1 - tau) * theta."""
    head_width: Positive = 1024
    """Hidden width H of the predictor head, Linear(D, H) - LayerNorm - ReLU - Linear(H, D)."""


class ObjectiveRecipe(Section):
    """What is optimised: with `popo` L = L_nll + alpha * L_sim + beta * L_ent. See docs/method.md."""

    algorithm: Literal["popo", "raft", "mixed", "grpo"] = "popo"
    """`popo`; `raft`, the same with uniform weights, no similarity and no entropy; `mixed`, `popo` with a term that
    lowers wrong answers; `grpo`, clipped policy gradients with group-relative advantages of all answers."""
    alpha: Rate = 0.1
    """Weight of the similarity term; 0 leaves out the siamese pass. 0 with `raft` and `grpo`."""
    beta: Rate = 0.01
    """Weight of the entropy term. If not set, 0 with `raft` and `grpo`."""
    target_entropy: Annotated[float, Field(gt=0)] | None = None
    """Mean token entropy in nats that beta is steered to. Unset: beta stays constant."""
    beta_gain: Annotated[float, Field(gt=0)] = 0.05
    """With `target_entropy`: log(beta) moves by this times the relative entropy error, each step."""
    weights: Literal["mean_logprob", "uniform", "sequence_logprob"] = "mean_logprob"
    """Self-normalised weights over a prompt's positives: softmax of the mean token log-prob, uniform, or
    softmax of the summed log-prob (nearly winner-take-all)."""
    weight_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of that softmax."""
    weights_from: Literal["sampler", "trainer"] = "sampler"
    """Whose log-probs make the weights: those that came with the rollouts (free), or a no-grad pass."""
    normalizer: Literal["token_mean", "reference", "sequence_sum", "sequence_mean"] = "token_mean"
    """What L_nll is divided by, fixed for a whole step. `sequence_mean` is biased to short answers."""
    target: Literal["predictor", "features"] = "predictor"
    """What the policy's predictor output is compared with: the siamese's predictor output or features."""
    importance_cap: Annotated[float, Field(gt=0)] | None = None
    """Weigh each token by min(policy / sampler probability, this cap). Unset: no such weight."""
    noise_sigma: Rate = 0.02
    """Gaussian noise on that target, relative to its root mean square."""
    entropy_over: Literal["positives", "all"] = "positives"
    """Rollouts whose entropy counts. `all` forwards the negatives too."""
    reward_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """A rollout is positive when its reward is above this."""
    skip_all_right: bool = False
    """Leave groups without a wrong answer out of the update: raising all that a prompt gets is little but noise, and
    late in a run most tokens can be such. `grpo` does so in any case."""
    negative_weight: Rate = 0.1
    """With `mixed`: weight of the mean log-prob of wrong answers, which is lowered."""
    advantage_scaling: Literal["std", "none"] = "std"
    """With `grpo`: divide a group's advantages by the standard deviation of its rewards, or not."""
    length_normalization: Literal["sequence", "token", "constant"] = "sequence"
    """With `grpo`: every answer counts alike whatever its length (as published), every token counts alike (DAPO), or
    tokens are divided by `rollout.max_completion_tokens` (Dr. GRPO)."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """With `grpo`: policy over sampler probability below 1 minus this is clipped where the advantage is negative."""
    clip_high: Rate = 0.2
    """With `grpo`: the ratio above 1 plus this is clipped where the advantage is positive."""
    kl: Rate = 0.0
    """With `grpo`: weight of the KL divergence from the base, whose log-probs come from a pass without any adapter,
    that of `lora.init_from` included."""
    kl_correction: bool = True
    """With `grpo`: multiply the KL term by the importance ratio, which makes its gradient that of the divergence
    (DeepSeek-V3.2); without it as published first."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_algorithm(cls, settings: Any) -> Any:
        """Terms that an algorithm does not have are off where they are not set."""
        if isinstance(settings, dict) and settings.get("algorithm") in ("raft", "grpo"):
            settings = {"alpha": 0.0, "beta": 0.0, **settings}
            if settings["algorithm"] == "raft":
                settings = {"weights": "uniform", **settings}
        return settings


class RolloutRecipe(Section):
    """How answers are sampled."""

    engine: Literal["auto", "hf", "vllm", "server"] = "auto"
    """`hf` samples from the trainer's own model, `vllm` from an engine in the same process, `server` from vLLM
    servers elsewhere. `auto` takes `vllm` where it is installed, else `hf`."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """G, rollouts per prompt."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature; training uses the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Must stay 1: the log-probs of a cut distribution are not the policy's."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Top-k sampling. Must stay 0 (off), for the same reason."""
    max_prompt_tokens: Positive = 512
    """Longest rendered prompt."""
    max_completion_tokens: Positive = 1024
    """Longest answer; a longer one is cut and graded as it stands."""
    batch_size: Positive = 64
    """Sequences decoded at once."""
    base: Literal["dequantized", "nf4", "bf16"] = "dequantized"
    """Base that the vLLM engine serves: the trainer's own base dequantised to `model.dtype`, which is the policy
    that is trained; the same in 4 bit (GPU only); or the original 16-bit weights."""
    gpu_memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.35
    """Share of the GPU's memory for the vLLM engine: weights and KV cache."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """Precision of the vLLM engine's KV cache; `auto` is `model.dtype`."""
    eager: bool = False
    """Run the vLLM engine without compiling it: starts sooner, samples slower."""
    sleep: bool = True
    """Share the GPU in turns: the vLLM engine gives its memory back while training, and the optimizer's state
    waits in host memory while answers are sampled."""
    max_gap_multiple: Annotated[float, Field(gt=1)] = 50.0
    """Stop the run when the mean gap between the sampler's and the trainer's log-probs grows to more than this
    multiple of what it was at the start."""
    servers: tuple[str, ...] = ()
    """URLs of vLLM servers, for engine `server`. Their token is read from POPO_SERVER_TOKEN."""
    shared_dir: str | None = None
    """Folder that trainer and servers both see, for adapters; needed by engine `server`."""
    budget: Literal["fixed", "adaptive"] = "fixed"
    """`fixed`: G rollouts for every prompt. `adaptive`: rounds of `round_size` until a prompt has
    `positives_wanted` positives or `max_rollouts` rollouts; what easy prompts save goes to hard ones, and a step makes
    at most P * G rollouts."""
    positives_wanted: Positive = 2
    """Adaptive budget: a prompt with this many positives is sampled no further. All its positives are trained on."""
    round_size: Positive = 2
    """Adaptive budget: rollouts per prompt and round; at most `group_size`."""
    max_rollouts: Annotated[int, Field(ge=2)] = 8
    """Adaptive budget: most rollouts of one prompt. At `group_size` or below, what easy prompts save is saved and not
    spent on hard ones."""
    skip_known: bool = False
    """Leave out prompts that were all right (4 rollouts or more) or hopeless (G or more) when last sampled. For data
    sets that are gone through several times."""
    explore_share: Share = 0.1
    """With `skip_known`: chance, each time such a prompt comes up, that it is sampled all the same."""


class DatasetRecipe(Section):
    """Where problems come from."""

    dataset: str | None = None
    """`arithmetic`, `deepscaler`, `gsm8k`, `math500`, a .jsonl/.json/.csv/.parquet file, or a Hub id."""
    config: str | None = None
    """Configuration name of a Hub dataset."""
    split: str | None = None
    """Split of a Hub dataset."""
    prompt_column: str | None = None
    """Column with the question; known datasets bring their own."""
    answer_column: str | None = None
    """Column with the reference answer; known datasets bring their own."""
    filter: dict[str, ColumnValue | tuple[ColumnValue, ...]] = {}
    """Keep rows whose column equals a value or is among a list: `filter = { level = [4, 5] }`."""
    limit: Positive | None = None
    """Use only this many rows, the first ones."""


class DataRecipe(DatasetRecipe):
    """What is trained on."""

    dataset: str = "arithmetic"
    """`arithmetic`, `deepscaler`, `gsm8k`, `math500`, a .jsonl/.json/.csv/.parquet file, or a Hub id."""
    digits: Annotated[int, Field(ge=1, le=6)] = 2
    """Digits of each number of the built-in arithmetic."""
    system_prompt: str | None = None
    """System message in front of every question."""
    chat_template: str | None = None
    """A Jinja chat template to use instead of the tokenizer's."""
    overlong_prompts: Literal["error", "skip"] = "error"
    """What to do with a prompt longer than `rollout.max_prompt_tokens`; skipped ones are counted."""
    prompts_per_step: Positive = 32
    """P, prompts per optimizer step."""


class RewardRecipe(Section):
    """How answers are graded, in worker processes that can be killed."""

    function: str = "math"
    """`math` (math-verify), or any Python function as `module:name`. See docs/rewards.md."""
    workers: Annotated[int, Field(ge=1, le=64)] = 2
    """Grading processes."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Time for one answer before its worker is killed."""
    max_answer_characters: Positive = 20000
    """Only this much of an answer's end is graded."""
    truncated: Literal["grade", "wrong"] = "grade"
    """An answer that training cut off at `rollout.max_completion_tokens`: graded as it stands, or wrong. `wrong` for
    models that think first, of which a positive that never ends would teach not to end."""
    max_ungraded_share: Share = 0.2
    """Stop the run when more of a step than this times out or errs."""


class OptimizerRecipe(Section):
    """How adapters and predictor head are updated."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """AdamW by torch, or with 8-bit state by bitsandbytes."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of the adapters."""
    head_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the predictor head."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_share: Share = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Rate = 0.01
    """Decoupled weight decay; biases and norms are spared."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""


class TrainRecipe(Section):
    """The run itself."""

    steps: Positive = 100
    """Optimizer steps."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Everything random is derived from this."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a CUDA GPU where there is one."""
    cpu_threads: Annotated[int, Field(ge=0)] = 0
    """Threads of torch on the CPU; 0 leaves torch's choice. Tiny models are fastest with 1."""
    tokens_per_microbatch: Positive = 8192
    """Token budget of one forward and backward pass; sequences are packed into it without padding. Lowered by the
    run itself when memory runs out. Without dropout it does not change the update beyond rounding."""
    packing: bool = True
    """Put whole sequences one behind another in a row, each attending to itself alone. Off, and always with eager
    attention, with a sliding window shorter than the sequences and with unsloth: one sequence at a time."""
    logits_mib: Positive = 256
    """Memory, in MiB, for the logits of one chunk of tokens and for their gradient. Does not change the update."""
    compile_loss: bool = True
    """On a GPU, compile the part of the loss that goes through the logits row by row (torch.compile)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    offload_activations: bool = False
    """With `gradient_checkpointing`: keep each layer's input in host memory until the backward pass needs it."""
    checkpoint_every: Positive = 50
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints to keep."""


class EvalRecipe(DatasetRecipe):
    """What is measured before and after training. Unset `dataset`: problems held out from training."""

    problems: Annotated[int, Field(ge=0)] = 200
    """Held-out problems; 0 turns evaluation off."""
    samples_per_problem: Positive = 1
    """Sampled answers per problem; k of pass@k goes up to this."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature."""
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate every so many steps as well; 0 is only before and after."""


class OutputRecipe(Section):
    """Where results go."""

    dir: str = "runs"
    """Folder that run folders are made in."""
    samples_per_step: Annotated[int, Field(ge=0)] = 2
    """Prompts per step whose answers are written to samples.jsonl."""


class Recipe(Section):
    """A whole run."""

    model: ModelRecipe = ModelRecipe()
    lora: LoraRecipe = LoraRecipe()
    siamese: SiameseRecipe = SiameseRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    rollout: RolloutRecipe = RolloutRecipe()
    data: DataRecipe = DataRecipe()
    reward: RewardRecipe = RewardRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    train: TrainRecipe = TrainRecipe()
    eval: EvalRecipe = EvalRecipe()
    output: OutputRecipe = OutputRecipe()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections as plain data; unset optional keys are left out, as TOML has no null."""
        return {
            name: {key: value for key, value in section.items() if value is not None}
            for name, section in self.model_dump(mode="json").items()
        }
