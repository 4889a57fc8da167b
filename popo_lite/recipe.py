"""Define every setting of a run with its type, range, default and meaning. Free of torch.

`docs/recipes.md`, `recipes/template.toml` and `popo-lite recipe show` are generated from this schema.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

Positive = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
ColumnValue = bool | int | float | str
# The schema is strict and frozen; only a TOML list may become a tuple.
Names = Annotated[tuple[str, ...], Field(strict=False)]
ColumnValues = Annotated[tuple[ColumnValue, ...], Field(strict=False)]
TaskSettings = dict[str, dict[str, ColumnValue | ColumnValues]]
"""Settings by task of reasoning-gym."""
TaskLevels = Annotated[tuple[TaskSettings, ...], Field(strict=False)]


class Section(BaseModel):
    """A table of the recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with other values by dotted key, which are not checked. Raises KeyError for unknown keys."""
        copy = self
        for name, value in values.items():
            key, _, rest = name.partition(".")
            if key not in type(self).model_fields:
                raise KeyError(f"{type(self).__name__} has no key {key!r}")
            copy = copy.model_copy(update={key: getattr(copy, key).with_values({rest: value}) if rest else value})
        return copy


class ModelRecipe(Section):
    """The base model. It stays frozen; only LoRA adapters and the predictor head are trained."""

    id: str = "tiny"
    """`tiny` (ships with the package), a folder, a `.gguf` file, or a Hub id such as `Qwen/Qwen2.5-Math-1.5B`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    backend: Literal["transformers", "unsloth"] = "transformers"
    """Library that loads base and adapters. `unsloth` needs a CUDA GPU and the `gpu` extra."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4`: 4-bit NormalFloat by bitsandbytes, for fused experts too. `none`: the base stays in `dtype`. A checkpoint
    that is stored in bitsandbytes' 4 bits stays as it is."""
    double_quantization: bool = True
    """Quantise the NF4 scales too: about 0.4 bits a parameter less."""
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = "bfloat16"
    """Compute dtype. Adapters, predictor head and siamese always have at least float32. `float16` is for GPUs without
    bfloat16 (T4, RTX 20xx): its losses are scaled, and models whose activations overflow in it are refused."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers. A model that `sdpa` would compute wrongly gets `eager`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read that code first."""


class LoraRecipe(Section):
    """The trainable adapters (PEFT)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank r of the update BA."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by alpha / r (alpha / sqrt(r) with `rslora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in front of A. Above 0, sampling and training use different policies. The base's own dropout is off."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Layers of the text model that get an adapter: a list of module names, or `all-linear`, which leaves out routers
    and experts. Never the LM head."""
    rslora: bool = False
    """Rank-stabilised scaling."""
    dora: bool = False
    """Weight-decomposed LoRA."""
    init_from: str | None = None
    """Folder of a PEFT adapter to start from, for a base that is rarely right."""


class SiameseRecipe(Section):
    """The siamese network: an exponential moving average of adapters and predictor head, in float32."""

    tau: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay per optimizer step: xi <- tau * xi + (1 - tau) * theta."""
    head_width: Positive = 1024
    """Hidden width H of the predictor head, Linear(D, H) - LayerNorm - ReLU - Linear(H, D)."""


class Objective(Section):
    """The loss. Every algorithm has keys of its own; docs/method.md has the formulas."""

    algorithm: Literal["popo", "raft", "mixed", "grpo"] = "popo"
    """`popo`; `raft`, the likelihood of correct answers alone; `mixed`, `popo` plus a term that lowers wrong answers;
    `grpo`, clipped policy gradients with group-relative advantages."""

    @property
    def needs_siamese_pass(self) -> bool:
        """True if the loss has a similarity term."""
        return bool(getattr(self, "similarity_coef", 0.0))

    @property
    def needs_reference_pass(self) -> bool:
        """True if the loss has a KL term, which needs the base model's log-probs."""
        return bool(getattr(self, "kl_coef", 0.0))


class EntropyObjective(Objective):
    """The entropy bonus, which RAFT lacks."""

    entropy_coef: Rate = 0.01
    """Weight of the entropy bonus (beta in the POPO paper)."""
    target_entropy: Annotated[float, Field(gt=0)] | None = None
    """Mean token entropy in nats that `entropy_coef` is steered to. Unset: the coefficient stays constant."""
    entropy_coef_gain: Annotated[float, Field(gt=0)] = 0.05
    """With `target_entropy`: log(entropy_coef) changes by this times the relative entropy error, each step."""


class RaftObjective(Objective):
    """RAFT: the mean negative log-likelihood of the positives, L_nll. POPO adds terms to it."""

    algorithm: Literal["raft"] = "raft"
    normalizer: Literal["token_mean", "reference", "sequence_sum", "sequence_mean"] = "token_mean"
    """Divisor of L_nll, fixed for a whole step. `sequence_mean` favours short answers."""
    importance_sampling_clip_max: Annotated[float, Field(gt=0)] | None = None
    """Weight each token by min(policy / sampler probability, this cap). Unset: no such weight."""
    skip_all_right: bool = False
    """Train only on groups with a wrong answer, as `grpo` does: the rest teach little and can take most tokens."""


class PopoObjective(RaftObjective, EntropyObjective):
    """Positive-Only Policy Optimization: L = L_nll + similarity_coef * L_sim + entropy_coef * L_ent."""

    algorithm: Literal["popo"] = "popo"  # type: ignore[assignment]
    similarity_coef: Rate = 0.1
    """Weight of the similarity term (alpha in the POPO paper); 0 skips the siamese pass."""
    weights: Literal["mean_logprob", "uniform", "sequence_logprob"] = "mean_logprob"
    """Weights of a prompt's positives: softmax of the mean log-prob, equal, or softmax of the sum (nearly one-hot)."""
    weight_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of that softmax."""
    weights_from: Literal["sampler", "trainer"] = "sampler"
    """Log-probs that the weights are computed from: those of the rollouts (free), or of a no-grad pass."""
    target: Literal["predictor", "features"] = "predictor"
    """Target of the similarity term: the siamese's predictor output or its features."""
    noise_sigma: Rate = 0.02
    """Gaussian noise on that target, relative to its root mean square."""
    entropy_over: Literal["positives", "all"] = "positives"
    """Rollouts whose entropy counts. `all` runs the negatives through the model too."""


class MixedObjective(PopoObjective):
    """POPO plus a term that lowers the likelihood of wrong answers."""

    algorithm: Literal["mixed"] = "mixed"  # type: ignore[assignment]
    negative_weight: Annotated[float, Field(gt=0)] = 0.1
    """Weight of the mean log-prob of wrong answers, which is lowered."""


class GrpoObjective(EntropyObjective):
    """GRPO: clipped importance ratios times group-relative advantages, with TRL's names."""

    algorithm: Literal["grpo"] = "grpo"
    entropy_coef: Rate = 0.0
    """Weight of the entropy bonus."""
    scale_rewards: Literal["group", "none"] = "group"
    """Divide a group's advantages by the standard deviation of its rewards, or not."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """Divide token losses by answer length (`grpo`), token count (`dapo`) or `max_completion_length` (`dr_grpo`)."""
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Clip the ratio policy / sampler at 1 minus this if the advantage is negative."""
    epsilon_high: Rate = 0.2
    """Clip the ratio at 1 plus this if the advantage is positive."""
    kl_coef: Rate = 0.0
    """Weight of the KL divergence from the base model without any adapter (`beta` in TRL)."""
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the importance ratio: an unbiased gradient (DeepSeek-V3.2). Off: as GRPO published it."""


AnyObjective = PopoObjective | RaftObjective | MixedObjective | GrpoObjective
OBJECTIVES: dict[str, type[Objective]] = {
    kind.model_fields["algorithm"].default: kind for kind in get_args(AnyObjective)
}


class AdaptiveRecipe(Section):
    """Adaptive rollout budget: sample a prompt in rounds until it has enough positives."""

    enabled: bool = False
    """Sample in rounds, at most `data.prompts_per_step` * `num_generations` rollouts a step. Off: exactly that many."""
    positives_wanted: Positive = 2
    """Stop sampling a prompt at this many positives. All its positives are trained on."""
    round_size: Positive = 2
    """Rollouts per prompt and round; at most `num_generations`."""
    max_rollouts: Annotated[int, Field(ge=2)] = 8
    """Most rollouts of one prompt. Above `num_generations`, rollouts saved on easy prompts go to hard ones."""


class VLLMRecipe(Section):
    """Settings of the engines `vllm` and `server`."""

    base: Literal["dequantized", "nf4", "bf16"] = "dequantized"
    """Base that vLLM serves: the trainer's 4-bit base dequantised to `model.dtype` (samples exactly the trained
    policy), the same base in 4 bit (GPU only), or the original 16-bit weights."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.35
    """Fraction of the GPU's memory for vLLM: weights and KV cache."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Precision of vLLM's KV cache; `auto` is `model.dtype`."""
    enforce_eager: bool = False
    """Run vLLM without compiling the model: starts sooner, samples slower."""
    enable_sleep_mode: bool = True
    """Share the GPU in turns: vLLM frees its memory to train, the optimizer's state moves to the host to sample."""


class ServerRecipe(Section):
    """Settings of the engine `server`."""

    base_urls: Names = ()
    """URLs of vLLM servers. Their token is read from POPO_SERVER_TOKEN."""
    urls_file: str | None = None
    """Text file with more URLs, one a line; # begins a comment. It is read again after every step, so that servers join
    and leave the run."""
    allow_http: bool = False
    """Send prompts, answers and token over plain `http://` to other machines, where others in the network can read
    them. `http://` to this machine is always allowed."""
    shared_dir: str | None = None
    """Folder that trainer and servers both see, for adapters."""


class EnvironmentRecipe(Section):
    """A conversation instead of one answer: model and environment take turns (docs/environments.md)."""

    name: Annotated[str, Field(pattern="^[^:]+:[^:]+$")] | None = None
    """Class of the environment, `module:Class`. Unset: one answer to each prompt."""
    options: dict[str, ColumnValue] = {}
    """Arguments of the class."""
    max_turns: Positive = 4
    """Most answers of the model in one conversation."""
    role: Literal["user", "tool"] = "user"
    """Role in which the chat template writes what the environment says."""


class RolloutRecipe(Section):
    """Sampling of answers."""

    engine: Literal["auto", "hf", "vllm", "server"] = "auto"
    """`hf` samples from the trainer's own model, `vllm` from an engine in the same process, `server` from vLLM
    servers. `auto` is `vllm` if it is installed, else `hf`."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """G, rollouts per prompt."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature; training uses the same one."""
    max_prompt_length: Positive = 512
    """Longest rendered prompt, in tokens."""
    max_completion_length: Positive = 1024
    """Longest answer, in tokens; a longer one is truncated. All that follows the prompt of a conversation."""
    max_num_seqs: Positive = 64
    """Sequences decoded at once: in each rank's engine, or at each server for all ranks together."""
    max_gap: Annotated[float, Field(gt=0)] | None = None
    """Stop the run if the mean |sampler - trainer| log-prob exceeds this many nats; a quarter of it warns. Unset: 0.2
    in bfloat16, with an fp8 KV cache or with `vllm.base = "bf16"`, 0.05 in float16, 2e-4 in float32, 1e-8 in float64;
    or 3 times the mean gap of the first steps, if that is more."""
    async_level: Literal[0, 1] = 0
    """Optimizer steps by which rollouts may be older than the policy they train. 1: servers sample the next step while
    one trains."""
    skip_known: bool = False
    """In later epochs, skip prompts whose last rollouts were all right (at least 4) or all wrong (at least G)."""
    explore_ratio: Ratio = 0.1
    """With `skip_known`: probability that such a prompt is sampled anyway."""
    vllm: VLLMRecipe = VLLMRecipe()
    server: ServerRecipe = ServerRecipe()
    adaptive: AdaptiveRecipe = AdaptiveRecipe()
    environment: EnvironmentRecipe = EnvironmentRecipe()

    @property
    def sequence_tokens(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.max_prompt_length + self.max_completion_length


class DatasetRecipe(Section):
    """The source of problems."""

    dataset: str | None = None
    """`arithmetic`, `comparison`, `deepscaler`, `gsm8k`, `math500`, tasks of reasoning-gym such as
    `reasoning-gym:chain_sum,leg_counting`, a .jsonl/.json/.csv/.parquet file, or a Hub id."""
    config: str | None = None
    """Configuration name of a Hub dataset."""
    split: str | None = None
    """Split of a Hub dataset."""
    prompt_column: str | None = None
    """Column with the question. Not needed for known datasets."""
    answer_column: str | None = None
    """Column with the reference answer. Not needed for known datasets."""
    filter: dict[str, ColumnValue | ColumnValues] = {}
    """Keep the rows in which a column has a value, or one of a list: `filter = { level = [4, 5] }`."""
    limit: Positive | None = None
    """Use only the first rows."""
    tasks: TaskSettings = {}
    """Settings of reasoning-gym's tasks, and their `weight` in the mix, 1 by default:
    `tasks = { chain_sum = { weight = 2, max_terms = 3 } }`."""


class CurriculumRecipe(Section):
    """Difficulty of the training problems, moved by the pass rate."""

    enabled: bool = False
    """Start at the easiest level and move by one at a time. Problems held out of `data.dataset` are of all levels."""
    low: Ratio = 0.3
    """Go back to the easier level if the pass rate is below this."""
    high: Ratio = 0.7
    """Go on to the harder level if the pass rate is above this."""
    window: Positive = 5
    """Steps over which the pass rate is averaged; the level stays for at least as many."""
    levels: TaskLevels = ()
    """Settings of reasoning-gym's tasks, level by level: `[{ chain_sum = { max_terms = 2 } }, ...]`. Empty:
    reasoning-gym's own curricula; what `data.tasks` sets stays as it is."""
    column: str | None = None
    """Column of a file or Hub dataset whose distinct values, sorted, are the levels."""


class DataRecipe(DatasetRecipe):
    """The training problems."""

    dataset: str = "arithmetic"
    """`arithmetic`, `comparison`, `deepscaler`, `gsm8k`, `math500`, tasks of reasoning-gym such as
    `reasoning-gym:chain_sum,leg_counting`, a .jsonl/.json/.csv/.parquet file, or a Hub id."""
    digits: Annotated[int, Field(ge=1, le=6)] = 2
    """Digits of each number of the built-in arithmetic."""
    system_prompt: str | None = None
    """System message in front of every question."""
    chat_template: str | None = None
    """A Jinja chat template to use instead of the tokenizer's."""
    date: Annotated[datetime.date, Field(strict=False)] | None = None
    """The date that templates such as Llama 3.2's write into prompts. Default: the day on which the run starts."""
    overlong_prompts: Literal["error", "skip"] = "error"
    """If a prompt is longer than `rollout.max_prompt_length`: stop, or skip and count it."""
    prompts_per_step: Positive = 32
    """P, prompts per optimizer step."""
    curriculum: CurriculumRecipe = CurriculumRecipe()


class RewardFunction(Section):
    """A function that grades an answer, as `reward.functions` lists it."""

    name: str
    """A built-in function, or your own, `module:function`."""
    weight: float = 1.0
    """Weight in the total. Negative: a penalty, 1 minus the function's value counts. 0: only measured."""
    label: str | None = None
    """Name in `reward.positive_if` and in the metrics, if it is not `name`: for two functions of the same name."""

    @property
    def key(self) -> str:
        """Name in `reward.positive_if` and in the metrics."""
        return self.label or self.name


class OwnFunction(RewardFunction):
    """Your own function: `grade(text, problem)`, or one that was written for TRL."""

    name: Annotated[str, Field(pattern="^[^:]+:[^:]+$")]
    """`module:function`."""
    range: Annotated[tuple[float, float], Field(strict=False)] = (0.0, 1.0)
    """Least and largest value that it returns; mapped to 0 and 1."""
    completions: Literal["conversational", "text"] | None = None
    """Form of TRL's `completions`: lists of messages, or text. Unset: the form that it takes without an
    error; if it takes both and their values differ, it is refused."""


class MathFunction(RewardFunction):
    """Compare the final answer with the reference as mathematics."""

    name: Literal["math"] = "math"


class ExactFunction(RewardFunction):
    """Require the reference and nothing else, apart from white space around it."""

    name: Literal["exact"] = "exact"


class ChoiceFunction(RewardFunction):
    """Compare the last choice that the answer states with the reference, a letter or its index from 0."""

    name: Literal["choice"] = "choice"
    choices: Annotated[int, Field(ge=2, le=26)] = 5
    """Number of choices, from A."""


class NumericFunction(RewardFunction):
    """Compare the last numbers of answer and reference, within a tolerance. Units are ignored."""

    name: Literal["numeric"] = "numeric"
    tolerance: Rate = 0.0
    """Largest absolute difference that is right."""
    relative_tolerance: Rate = 0.0
    """Largest difference that is right, as a fraction of the reference."""


class RegexFunction(RewardFunction):
    """Search the text for a regular expression."""

    name: Literal["regex"] = "regex"
    pattern: str
    """Python's `re` syntax. It is searched for; `^`, `$` and `(?s)` make it the form of the whole text."""


class JsonSchemaFunction(RewardFunction):
    """Validate the last JSON value of the answer by a JSON Schema."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Literal["json_schema"] = "json_schema"
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """The schema, an inline table."""
    schema_file: str | None = None
    """A JSON file with the schema, instead of `schema`."""
    equals_reference: bool = False
    """The value must equal the reference, which is JSON, too."""


class PythonTestsFunction(RewardFunction):
    """Run the code of the answer against the tests of the problem."""

    name: Literal["python_tests"] = "python_tests"
    timeout_seconds: Annotated[float, Field(gt=0)] = 3.0
    """Longest time for all tests of an answer; less than `reward.timeout_seconds`."""
    memory_mib: Positive = 512
    """Memory of the code in MiB."""
    partial: bool = False
    """The value is the fraction of tests passed. Off: 1 if all pass, else 0. Only code that passes all is positive."""
    allow_uncontained: bool = False
    """Run the code even if this machine cannot contain it."""


class LengthFunction(RewardFunction):
    """Score the length of the text. Outside the limits the value falls linearly, to 0 at length 0 and twice `max`."""

    name: Literal["length"] = "length"
    min: Positive | None = None
    """Shortest length with the value 1."""
    max: Positive | None = None
    """Largest length with the value 1."""
    unit: Literal["words", "characters"] = "words"
    """Unit of `min` and `max`."""


class LanguageFunction(RewardFunction):
    """Return the fraction of letters that belong to a script. LaTeX commands are not counted."""

    name: Literal["language"] = "language"
    script: Literal[
        "Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek", "Gujarati",
        "Gurmukhi", "Han", "Hangul", "Hebrew", "Japanese", "Kannada", "Khmer", "Lao", "Latin", "Malayalam", "Myanmar",
        "Sinhala", "Tamil", "Telugu", "Thai", "Tibetan",
    ]  # fmt: skip
    """The script. `Japanese` is kana and Han."""


class ReasoningGymFunction(RewardFunction):
    """Does the verifier of Reasoning Gym accept the answer?"""

    name: Literal["reasoning_gym"] = "reasoning_gym"


class EnvironmentFunction(RewardFunction):
    """Take the reward that the environment gives to the conversation."""

    name: Literal["environment"] = "environment"
    environment: str = ""
    """Taken from `rollout.environment.name`."""
    options: dict[str, ColumnValue] = {}
    """Taken from `rollout.environment.options`."""


def function_tag(value: Any) -> str:
    """Return which of the `FUNCTIONS` a table of `reward.functions` is, or "own"."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if isinstance(name, str) and name in FUNCTIONS else "own"


AnyFunction = Annotated[
    Annotated[MathFunction, Tag("math")]
    | Annotated[ExactFunction, Tag("exact")]
    | Annotated[ChoiceFunction, Tag("choice")]
    | Annotated[NumericFunction, Tag("numeric")]
    | Annotated[RegexFunction, Tag("regex")]
    | Annotated[JsonSchemaFunction, Tag("json_schema")]
    | Annotated[PythonTestsFunction, Tag("python_tests")]
    | Annotated[LengthFunction, Tag("length")]
    | Annotated[LanguageFunction, Tag("language")]
    | Annotated[ReasoningGymFunction, Tag("reasoning_gym")]
    | Annotated[EnvironmentFunction, Tag("environment")]
    | Annotated[OwnFunction, Tag("own")],
    Discriminator(function_tag),
]
FUNCTIONS: dict[str, type[RewardFunction]] = {
    tag.tag: kind for kind, tag in map(get_args, get_args(get_args(AnyFunction)[0])) if kind is not OwnFunction
}
"""Name of a built-in function -> its options."""


def _as_tables(value: Any) -> Any:
    """Return `reward.functions` as a list of tables; a name stands for a table with that name."""
    values = [value] if isinstance(value, str) else value
    return [{"name": one} if isinstance(one, str) else one for one in values] if isinstance(values, list) else values


class RewardRecipe(Section):
    """Grading of answers, in worker processes that can be killed."""

    functions: Annotated[
        tuple[AnyFunction, ...] | None, Field(strict=False, min_length=1), BeforeValidator(_as_tables)
    ] = None
    """Functions that grade an answer: a name, or a list of names and tables. Built-in functions: `math`, `exact`,
    `choice`, `numeric`, `regex`, `json_schema`, `python_tests`, `length`, `language`, `reasoning_gym`,
    `environment`; your own: `module:name`. The reward is the weighted mean of their values: see docs/rewards.md.
    Unset: `environment` with a `rollout.environment`, `reasoning_gym` for its datasets, else `math`."""
    positive_if: Literal["total"] | Names = "total"
    """An answer is positive if the reward is above `threshold`, or if each of these functions is."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """An answer is positive above this."""
    thinking_tags: Annotated[tuple[Text, Text], Field(strict=False)] = ("<think>", "</think>")
    """Tags around a model's thinking, which is not part of its answer."""
    keep_special_tokens: bool = False
    """Grade the text with its special tokens, except padding and the end. Off: without them, except thinking tags."""
    workers: Annotated[int, Field(ge=1, le=64)] = 2
    """Grading processes."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Kill a worker that takes longer for one answer."""
    max_answer_characters: Positive = 20000
    """Grade only the end of an answer, up to this length."""
    truncated: Literal["grade", "wrong"] = "grade"
    """Grade an answer cut off at `rollout.max_completion_length` as it is, or count it wrong. Use `wrong` for thinking
    models: rewarding truncated answers teaches a model never to stop."""
    max_ungraded_ratio: Ratio = 0.2
    """Stop the run if grading fails or times out for a larger part of a step."""


class OptimizerRecipe(Section):
    """The updates of adapters and predictor head."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """AdamW by torch, or with 8-bit state by bitsandbytes."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of the adapters."""
    head_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the predictor head."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Ratio = 0.1
    """Part of the steps in which the learning rate rises from 0."""
    weight_decay: Rate = 0.01
    """Decoupled weight decay, not for biases and norms."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Clip gradients to this global norm."""


class TrainRecipe(Section):
    """The run itself."""

    steps: Positive = 100
    """Optimizer steps."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a CUDA GPU if there is one."""
    cpu_threads: Annotated[int, Field(ge=0)] = 0
    """Torch's CPU threads; 0 is torch's default. Tiny models are fastest with 1."""
    tokens_per_microbatch: Positive = 8192
    """Tokens of one forward and backward pass, packed without padding. Reduced automatically if memory runs out.
    Changes the update only by rounding (without dropout)."""
    packing: bool = True
    """Pack several sequences into one row, each attending only to itself. Off: one sequence at a time, as always with
    eager attention, unsloth, a sliding window shorter than the sequences, or layers that pass on a state (Mamba)."""
    shared_prefix: bool = True
    """With `packing`, except flash_attention_2: compute a prompt once for all its answers in a micro-batch, and equal
    answers once. Changes the update only by rounding (without dropout)."""
    logits_mib: Positive = 256
    """MiB for the logits of one chunk of tokens and their gradient. Does not change the update."""
    compile_loss: bool = True
    """Compile the loss on a GPU (torch.compile)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass, those of MLPs and norms over tiles of 2,048 tokens: much less memory,
    about a third more time."""
    offload_activations: bool = False
    """With `gradient_checkpointing`: keep each layer's input in host memory until the backward pass needs it. Copies
    run beside the computation."""
    save_steps: Positive = 50
    """Steps between checkpoints. The last step always writes one."""
    save_total_limit: Positive = 2
    """Newest checkpoints to keep. The best one by `eval.every` and the one for a rollback stay as well."""


class DistributedRecipe(Section):
    """A run on several GPUs or machines (docs/scaling.md). One process holds the whole base in any case."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """`ddp`: every GPU holds the whole base. `fsdp2`: each holds its part of the base; slower, for bases that are too
    large for one GPU. Use servers: `hf` gathers the whole base for rollouts. Changes the update only by rounding
    (without dropout)."""


class EvalRecipe(DatasetRecipe):
    """The evaluation before and after training. Without `dataset`, it takes problems held out from training."""

    problems: Annotated[int, Field(ge=0)] = 200
    """Held-out problems; 0 turns evaluation off."""
    samples_per_problem: Positive = 1
    """Answers per problem; the largest k of pass@k."""
    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between further evaluations; 0: only before and after training."""


class OutputRecipe(Section):
    """The files of a run."""

    dir: str = "runs"
    """Folder for run folders."""
    samples_per_step: Annotated[int, Field(ge=0)] = 2
    """Prompts per step whose answers go to samples.jsonl."""
    report_to: Annotated[
        tuple[Literal["trackio", "wandb", "tensorboard"], ...],
        Field(strict=False),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = ()
    """Trackers that receive the metrics, evaluations and samples, each an extra of the same name. A tracker that fails
    does not stop the run."""
    project: str = "popo-lite"
    """Project in trackers."""
    hub_model_id: Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")] | None = None
    """Repository on the Hub, `user/name`, to which the adapter of every checkpoint is uploaded. A failed upload does
    not stop the run."""
    hub_private_repo: bool = True
    """Make that repository private. One that others can see is refused then."""


class Recipe(Section):
    """A whole run."""

    model: ModelRecipe = ModelRecipe()
    lora: LoraRecipe = LoraRecipe()
    siamese: SiameseRecipe = SiameseRecipe()
    objective: AnyObjective = Field(default=PopoObjective(), discriminator="algorithm")
    rollout: RolloutRecipe = RolloutRecipe()
    data: DataRecipe = DataRecipe()
    reward: RewardRecipe = RewardRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    train: TrainRecipe = TrainRecipe()
    distributed: DistributedRecipe = DistributedRecipe()
    eval: EvalRecipe = EvalRecipe()
    output: OutputRecipe = OutputRecipe()

    @property
    def grading(self) -> RewardRecipe:
        """`reward` with the task's own function if it names none, and with the environment of conversations."""
        environment, functions = self.rollout.environment, self.reward.functions
        if functions is None:
            gym = self.data.dataset.startswith("reasoning-gym:")
            own = EnvironmentFunction() if environment.name else ReasoningGymFunction() if gym else MathFunction()
            functions = (own,)
        if environment.name is not None:
            if not any(isinstance(function, EnvironmentFunction) for function in functions):
                functions = (*functions, EnvironmentFunction(weight=0.0))
            values = {"environment": environment.name, "options": environment.options}
            functions = tuple(
                function.with_values(values) if isinstance(function, EnvironmentFunction) else function
                for function in functions
            )
        return self.reward.with_values({"functions": functions})

    def to_dict(self) -> dict[str, Any]:
        """Sections as plain data without unset optional keys, as TOML has no null."""
        return self.model_dump(mode="json", exclude_none=True)
