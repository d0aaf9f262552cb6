"""The loop that carries out a plan: when it trains, evaluates, logs, saves and ends."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco.checkpoint import Checkpoints
from jaxeco.experiment import Experiment
from jaxeco.forward import results
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log
from jaxeco.plan import Plan
from jaxeco.profile import Profile
from jaxeco.recovery import Diverged, rolled_back, skipped, way_back
from jaxeco.train import State
from jaxeco.watch import Watch


def fit(
    plan: Plan,
    state: State,
    checkpoints: Checkpoints,
    log: Log,
    interrupt: Interrupt,
    stop_at: int | None = None,
    profile: Profile | None = None,
) -> State:
    """Trains from `state` to the end of the run, to step `stop_at`, or until interrupted.

    The run also ends where `stalled` says so. Evaluates, logs and saves on the way; the State that
    it returns has been saved. The host runs ahead of the device and reads a call's sums only when
    the log, an evaluation or a checkpoint is due, so that the device never waits for it. Where the
    experiment's guard says so, it goes back to a checkpoint from before a bad step.

    Raises:
      Diverged: the loss became NaN or infinite, or the guard gives up; the error holds the State.
    """
    ex = plan.ex
    every_eval, every_save, every_log = (
        stretch.steps(plan.steps_per_epoch)
        for stretch in (ex.eval_every, ex.save_every, ex.log_every)
    )
    end = min(plan.steps, stop_at or plan.steps)
    call, feed = plan.compiled(), plan.feed()
    evaluators = plan.evaluators()
    watch = Watch(log, feed)
    step, offset = int(state.step), int(state.offset)
    first = step
    pending: list[Any] = []  # sums of the calls that the log has not seen, [n, ...] each
    seen = step  # steps that it has seen

    def report() -> None:
        """Hands the log what the pending calls came to; waits for them."""
        nonlocal seen
        if pending:
            # straight from each array: jax.device_get takes six times as long for small ones
            sums = jax.tree.map(lambda *a_n: np.concatenate(a_n), *pending)
            for said in skipped(ex, sums, seen):
                log.warn(said)
            rate = {"learning_rate": ex.optimizer.learning_rate(step - 1, plan.steps)}
            log.train(step, mean_over(ex, sums) | watch.waiting() | rate)
            pending.clear()
            seen = step

    def evaluate() -> dict[str, float]:
        """Evaluates on all splits; returns the scalars, named. {} if interrupted."""
        found: dict[str, dict[str, Any]] = {}
        for split, evaluator in evaluators.items():
            values = evaluator(state.params, state.variables, interrupt.asked)
            if values is None:
                return {}
            if not np.isfinite(loss := values["loss"]):
                raise Diverged(f"the loss on {split!r} is {loss} after step {step}", step)
            found[split] = chosen_first(ex, split, values)
        for split, values in found.items():
            log.evaluation(step, split, values)
        return {
            f"{split}/{name}": value
            for split, values in found.items()
            for name, value in values.items()
            if np.ndim(value) == 0
        }

    with feed, watch, profile or contextlib.nullcontext():
        while True:
            try:
                if profile and profile.ended(step, state):
                    log.mark(step)
                    watch.mark()
                scores = {}
                due = step and (step % every_eval == 0 or step >= end)
                if due and not all(log.evaluated(step, split) for split in evaluators):
                    report()
                    scores = evaluate()
                    watch.compiled("an evaluation", step)
                done = step >= end or interrupt.asked() or (due and stalled(plan, log) is not None)
                if done or scores or (step and step % every_save == 0):
                    report()  # so that no State is saved behind a loss that is not finite
                    if not all_finite(state.params):  # nor one whose loss is yet to show it
                        why = f"the parameters are not finite after step {step}"
                        raise Diverged(why, max(step - 1, 0), training=True)
                    # an evaluation because of `stop_at` is no candidate for the best: another run,
                    # stopped elsewhere, would not have it
                    scores = scores if plan.evaluates_at(step) else {}
                    needed = plan.last_saved(step) if ex.guard else None  # to go back to
                    checkpoints.save(state, scores, step=step, needed=needed)
                    log.mark(step)
                    watch.mark()
                    watch.compiled("a checkpoint", step)
                if done:
                    checkpoints.wait()
                    return state
                if profile:
                    profile.begins(step, state)
                n = plan.call_length(step, end)
                state, sums = call(state, feed.resident, watch.fed(step + offset, n))
                watch.called(step, n, sums)
                if step == first:  # rates count from here, when it is compiled and has run once
                    jax.block_until_ready(sums)
                    log.mark(step + n)
                    watch.mark()
                if pending and step // every_log > seen // every_log:
                    report()  # of the calls before this one, on which the device is busy now
                    watch.compiled("a line of the log", step)
                pending.append(sums)
                step += n
            except Diverged as error:
                error.state = state
                back = way_back(plan, error)
                if profile:
                    profile.went_back(back.step)
            else:
                continue
            del state  # there may be no room for two
            state = rolled_back(plan, checkpoints, log, back)
            watch.compiled(f"roll-back {back.count}", back.step)
            pending.clear()
            step, offset = int(state.step), int(state.offset)
            first = seen = step


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def chosen_first(ex: Experiment, split: str, values: dict[str, Any]) -> dict[str, Any]:
    """The same values: after the loss that by which the best is chosen, so that a line shows it."""
    first = [name for name in ("loss", *values) if name == "loss" or f"{split}/{name}" == ex.best]
    return {name: values[name] for name in dict.fromkeys([*first, *values])}


def stalled(plan: Plan, log: Log) -> int | None:
    """The step of the best evaluation, if `patience` have followed without a better one.

    A function of the evaluations on record, which a resumed run has as well.
    """
    ex = plan.ex
    recorded = log.history(ex.best) if ex.best else []
    history = [(step, value) for step, value in recorded if plan.evaluates_at(step)]
    if ex.patience is None or not history:
        return None
    steps, values = zip(*history, strict=True)
    scores = np.nan_to_num(values if ex.best_mode == "max" else np.negative(values), nan=-np.inf)
    best = int(np.argmax(scores))  # the first of equals
    return steps[best] if len(steps) - 1 - best >= ex.patience else None


def mean_over(ex: Experiment, sums: dict[str, Any]) -> dict[str, Any]:
    """Each metric over all steps but those that went bad, and what the guard counts.

    Args:
      sums: of each step, [N, ...], on the host.
    """
    said = {}
    if ex.guard:
        verdict = sums.pop("guard")
        sums = jax.tree.map(lambda a_N: a_N[~verdict.bad], sums)
        name = "skipped" if ex.guard.then == "skip" else "rolled_back"
        said = {name: int(verdict.count[-1])}
    return results(ex, jax.tree.map(lambda a_N: np.sum(a_N, 0, np.float64), sums)) | said
