"""Open all that a run needs: problems, grader, policy with its learner, sampler. Check it before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch

from popo_lite.ahead import Rollouts
from popo_lite.balance import idle_ranks
from popo_lite.callbacks import Callback
from popo_lite.checkpoint import Cursor
from popo_lite.controls import Controls
from popo_lite.conversation import RolloutWorker
from popo_lite.distributed import Ranks
from popo_lite.evaluation import check_references, fitting, not_solved
from popo_lite.events import RunEvents
from popo_lite.grading import TRIED_PROBLEMS, Grader
from popo_lite.interrupts import Interrupts
from popo_lite.policy.device import check_cpu_size, check_dtype, cuda_problem, pick_device
from popo_lite.policy.load import load_config
from popo_lite.policy.policy import load_policy
from popo_lite.policy.tokens import open_renderer
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder
from popo_lite.samplers import open_sampler, pick_engine
from popo_lite.samplers.probe import SamplerGuard
from popo_lite.tasks import open_tasks
from popo_lite.tasks.datasets import first
from popo_lite.update import Learner
from popo_lite.verdicts import Verdicts


class OpenRun:
    """Everything that a run holds. Use as a context manager. `controls` takes requests while it trains.

    `memory_advice` returns what to change in the recipe when GPU memory runs out. `ranks` are the processes of the run.
    """

    folder: RunFolder
    worker: RolloutWorker
    cursor: Cursor

    def __init__(
        self,
        recipe: Recipe,
        callback: Callback,
        *,
        memory_advice: Callable[[], str] = lambda: "popo-lite plan RECIPE shows what takes how much memory",
        ranks: Ranks | None = None,
    ) -> None:
        self.recipe, self.memory_advice, self.ranks = recipe, memory_advice, ranks or Ranks()
        self.interrupts = Interrupts(lambda text: self.callback.message(text))
        self.callback = callback = RunEvents(callback, self.interrupts.terminal_gone)
        self.controls = Controls(self.interrupts.stop, callback.message)
        # Before anything is opened: the recipe may want a GPU that is not there, or a dtype that it lacks.
        device = pick_device(recipe.train.device)
        check_dtype(recipe.model, device)
        if device.type == "cpu" and recipe.train.device == "auto" and (problem := cuda_problem()):
            callback.message(f"training on the CPU: {problem[0]}; {problem[1]}")
        if recipe.train.cpu_threads:
            torch.set_num_threads(recipe.train.cpu_threads)
        if idle := idle_ranks(recipe.data.prompts_per_step, self.ranks.size):
            callback.message(idle)
        _, self.engine = pick_engine(recipe, self.ranks)
        with ExitStack() as stack:
            self._open_task(stack)
            self.learner = Learner(
                recipe, self.policy, notify=callback.message, memory_advice=memory_advice, ranks=self.ranks
            )
            self.rollouts = Rollouts(
                recipe, self.train_task, self.ranks, say=callback.message, check=self.interrupts.check
            )
            self._open_sampler(stack)
            self.worker = RolloutWorker(
                recipe=recipe, renderer=self.renderer, sampler=self.sampler, grader=self.grader, ranks=self.ranks
            )
            stack.callback(self.rollouts.drop)
            self._resources = stack.pop_all()
        self.cursor = Cursor(entropy_coef=getattr(recipe.objective, "entropy_coef", 0.0))
        self._unwritten: list[tuple[Path, Mapping[str, Any]]] = []  # lines for the run's files
        self.verdicts = Verdicts(recipe, self.sampler.engine)
        self.guard = SamplerGuard(recipe, self.policy, self.sampler, callback.message)

    def _open_task(self, stack: ExitStack) -> None:
        """Open grader and problems, and load the policy; `popo-lite bench` makes them up."""
        check_cpu_size(self.recipe, pick_device(self.recipe.train.device))
        self.train_task, self.eval_task = open_tasks(self.recipe)
        self.held_out = self.eval_task.held_out(self.recipe.eval.problems) if self.recipe.eval.problems else []
        self.renderer = open_renderer(self.recipe)
        grader = Grader(self.recipe.grading, thinking_open=self.renderer.opens_thinking)
        self.grader = stack.enter_context(grader)
        self._check_references()
        self.grader.check([self.train_task.train_problem(self.recipe.train.seed, i) for i in range(TRIED_PROBLEMS)])
        self._check_prompts()  # before gigabytes are read
        self.policy = load_policy(self.recipe, self.ranks)
        for notice in self.policy.notices:
            self.callback.message(notice)

    def _open_sampler(self, stack: ExitStack) -> None:
        sampler = open_sampler(
            self.recipe, self.policy, text=self.renderer.text, notify=self.rollouts.notify, ranks=self.ranks
        )
        self.sampler = stack.enter_context(sampler)
        if not self.engine.startswith(sampler.engine):
            self.engine = sampler.engine  # the one that was picked did not start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object = None, error: BaseException | None = None, _trace: object = None) -> None:
        try:
            self._resources.close()
        except Exception:  # of an engine that has died: the error that ended the run must be seen
            self.callback.log.exception("what the run held could not be closed")
            if error is None:
                raise
        finally:
            self.callback.close()

    # --------------------------------------------------------------------- the run

    def _facts(self) -> dict[str, str]:
        recipe, policy = self.recipe, self.policy
        trained = sum(parameter.numel() for _, parameter in policy.trainable_parameters())
        quantized = "not quantised"
        if policy.quantized_modules:
            quantized = f"NF4, {policy.quantized_modules} layers, {policy.quantized_share:.0%} of the weights"
        if settings := getattr(load_config(recipe.model), "quantization_config", None):
            stored = str(settings.get("bnb_4bit_compute_dtype") or "float32")
            quantized += " as stored" if stored == recipe.model.dtype else f" as stored; {stored} there is not used"
        if (parts := policy.sharded_over.size) > 1:
            quantized += f", in {parts} parts"
        adaptive = " at most, adaptive" if recipe.rollout.adaptive.enabled else ""
        return {
            "model": f"{recipe.model.id} ({quantized}, {recipe.model.dtype})",
            "trained": f"{trained:,} weights (LoRA rank {recipe.lora.rank} + predictor head)",
            "siamese": f"+{self.learner.siamese.extra_bytes / 2**20:.2f} MiB",
            "data": self.train_task.name + (f", {self.train_task.levels} levels" if self.train_task.levels > 1 else ""),
            "rollouts": f"{self.engine}, {recipe.data.prompts_per_step} x {recipe.rollout.num_generations}{adaptive}",
            "stops at": " ".join(map(str, policy.tokenizer.convert_ids_to_tokens(sorted(policy.stop_ids)))),
            "device": str(policy.device) + (f" x {self.ranks.size} ranks" if self.ranks.size > 1 else ""),
            "sequences": "one at a time" if policy.packing == "off" else f"packed ({policy.packing})",
            "folder": str(self.folder.path),
        }

    def _check_references(self) -> None:
        """Leave out training problems that cannot be graded, and count those held out, now and not at step 400."""
        tasks = {id(task): task for task in (self.train_task, self.eval_task)}  # one task may be both
        for notice in chain.from_iterable(task.notices for task in tasks.values()):
            self.callback.message(notice)
        training, where = self.train_task.training(), "eval.dataset" if self.recipe.eval.dataset else "data.dataset"
        # A grader that is out of time on one rank would leave out a row there alone.
        found = check_references(training, self.grader, "training rows", "data.dataset")
        if unreadable := self.ranks.from_first(found):
            dropped = self.train_task.drop_training(lambda problem: unreadable.get(problem.id))
            what = f"{len(dropped)} of {len(training):,} training rows cannot be graded and are left out"
            self.callback.message(what + first(dropped))
        found = check_references(self.held_out, self.grader, "held-out problems", where)
        if unreadable := self.ranks.from_first(found):
            self.callback.message(not_solved(unreadable, len(self.held_out), "held-out problems"))

    def _check_prompts(self) -> None:
        """Find prompts that are too long, or that the chat template refuses, now and not at step 400."""
        if warning := self.renderer.check(self.train_task.train_problem(self.recipe.train.seed, 0)):
            self.callback.message(warning)
        if self.recipe.data.overlong_prompts == "error":
            for problem in (*self.held_out, *self.train_task.longest_candidates()):
                self.renderer.render(problem)
            return
        dropped = len(self.train_task.drop_training(lambda each: None if self.renderer.fits(each) else "is too long"))
        asked, self.held_out = len(self.held_out), fitting(self.held_out, self.renderer, self.recipe)
        if dropped or asked > len(self.held_out):
            self.callback.message(
                f"prompts longer than {self.renderer.max_prompt_length} tokens skipped: {dropped} of training, "
                f"{asked - len(self.held_out)} of evaluation"
            )

    def advance(self, amount: int) -> None:
        """Report progress inside a stage. Raises StopRequested after a second Ctrl-C, RankLostError without a rank."""
        self.interrupts.check()
        self.ranks.check()
        if amount:
            self.callback.advance(amount)
