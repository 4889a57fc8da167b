"""What a view knows of a run; and the scripted run that the tests of all views play."""

import io

import pytest

from helpers import record
from popo_lite.tools.console.views import SHOWN, PlainView, RunState
from popo_lite.tools.console.words import by_stage

HOSTILE = "[/red] \x1b[31m\x1b[2J\x9b2J bell\x07 \u202e \ud800 [bold]markup[/] 日本語 👩\u200d🔬\tnul\x00\r\n"
FACTS = {
    "model": "Qwen/Qwen2.5-Math-1.5B",
    "quantisation": "nf4",
    "adapters": "rank 16, all-linear",
    "data": "arithmetic",
    "engine": "hf",
    "device": "cpu",
    "run folder": "runs/2026-11-21_" + "long-name-" * 9,
}
STEPS = 30
SKIPPED = (3, 16)


def skipped(step: int) -> dict:
    none = dict.fromkeys(
        (
            *("loss", "loss_policy", "loss_similarity", "loss_entropy", "entropy", "entropy_over_start", "grad_norm"),
            *("effective_sample_size", "effective_sample_ratio", "siamese_cosine", "siamese_drift_over_bound"),
            *("logp_gap_mean", "logp_gap_p99", "logp_gap_max", "logp_k3", "update_norm", "positive_tokens_mean"),
            *("top_shape", "top_shape_ratio", "top_shape_start_ratio"),
        )
    )
    reason = "none of its 32 prompts has a right answer"
    return record(step, skipped_reason=reason, pass_rate=0.0, positives=0, **none)


def play(view, clock=None, steps: int = STEPS, done: int = 0) -> None:
    """The next `steps` of 60 steps, 12 seconds each, after `done`; stops in the middle of a rollout."""
    for step in range(steps):
        view.stage("rollout", total=256)
        view.advance(256)
        view.stage("update")
        if clock is not None:
            clock[0] += 12.0
        view.step({**(skipped(step) if step in SKIPPED else record(step)), "step": done + step})
        view.samples(
            [
                {
                    "step": step,
                    "question": "What is 23 + 48?",
                    "reference": "71",
                    "right": "20 + 40 + 11 = 71",
                    "wrong": "61",
                },
                {"step": step, "question": HOSTILE, "reference": HOSTILE, "right": None, "wrong": HOSTILE * 40},
            ]
        )
        if (step + 1) % 10 == 0:
            view.message(f"checkpoint of step {step + 1} saved to runs/x/step-{step + 1:06}")
    view.stage("rollout", total=256)
    view.advance(64)


def test_samples_stay_until_they_can_have_been_read():
    clock = [0.0]
    state = RunState(lambda: clock[0])
    first, second = ({"step": 1, "question": name, "reference": "", "right": None, "wrong": None} for name in "ab")
    state.samples([first, second])
    assert state.sample() == first
    state.samples([{**first, "question": "new"}, second])
    clock[0] = 9.9
    assert state.sample() == first
    clock[0] = 10.0
    assert state.sample()["question"] == "new"
    clock[0] = 20.0
    assert state.sample() == second


def test_time_left_is_the_median_pace_times_the_steps_left():
    clock = [0.0]
    state = RunState(lambda: clock[0])
    state.start(title="t", facts={}, total_steps=50, first_step=40)
    clock[0] = 500.0  # an evaluation before training is no step
    assert state.pace() == (None, None)
    state.step(record(40))
    assert state.pace()[0] == pytest.approx(12.2, abs=1e-9)
    for step, took in enumerate((10.0, 11.0, 300.0, 10.0), 41):
        clock[0] += took
        state.step(record(step))
    assert (state.steps_done, *state.pace()) == (45, 11.0, 55.0)


@pytest.mark.parametrize(("view", "kept"), [(RunState(), SHOWN), (PlainView(io.StringIO()), 1)])
def test_a_long_run_does_not_fill_memory_with_its_records(view, kept):
    for step in range(SHOWN + 5):
        view.step(skipped(step) if step < 3 else record(step))
    assert len(view.records) == kept
    assert view.records[-1]["step"] == SHOWN + 4
    assert (view.skips, view.steps_done) == (3, SHOWN + 5)


def test_the_total_among_the_seconds_is_no_stage():
    state = RunState(lambda: 0.0)
    state.step(record(1, seconds={"rollout": 3.0, "update": 1.0, "total": 5.0}))
    assert state.pace()[0] == 5.0
    assert by_stage({"rollout": 3.0, "total": 5.0}) == ({"rollout": 3.0}, 5.0)
    assert by_stage({"rollout": 3.0, "update": 1.5}) == ({"rollout": 3.0, "update": 1.5}, 4.5)


def test_steps_that_come_again_before_the_session_leave_sound_figures():
    state = RunState()
    state.start(title="", facts={}, total_steps=60, first_step=50)
    state.evaluated({"when": "asked", "step": 50, "pass_at_1": 0.5})
    state.step(record(50, skipped_reason="none"))
    state.evaluated({"when": "asked", "step": 51, "pass_at_1": 0.6})
    state.evaluated({"when": "step 40", "step": 40, "pass_at_1": 0.4})
    state.step(skipped(40))  # the run went back
    assert (state.first_step, state.steps_done, state.skips) == (40, 41, 1)
    assert [line["step"] for line in state.evaluations] == [40]


def test_a_signal_in_the_middle_of_a_line_writes_its_message_after_it():
    class Stream(io.StringIO):
        def write(self, text):
            if self.writes:
                raise RuntimeError("reentrant call")
            self.writes = True
            if "first" in text:
                view.message("of the signal")
            self.writes = False
            return super().write(text)

    stream = Stream()
    stream.writes = False
    view = PlainView(stream)
    view.message("first")
    view.close()
    assert [line[10:] for line in stream.getvalue().splitlines()] == ["first", "of the signal"]
