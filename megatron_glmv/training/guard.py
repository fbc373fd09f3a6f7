"""What is done about a step that goes wrong: gradients that are not finite, a loss or a gradient norm far above the usual.

The update of such a step is never applied. What follows is a policy: go on with the next rows, go back to the last checkpoint
and leave the rows out, or end the run. What is usual is told by the steps before: median and median deviation, which a few
strange steps do not move. They are saved with every checkpoint, so that a resumed run judges as the unbroken one would have.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from megatron_glmv.config.base import InputError
from megatron_glmv.config.training import GuardConfig, GuardPolicy
from megatron_glmv.training.state import TrainState

_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class GuardError(InputError):
    """The guard ends the run; the message says what it saw and what to do."""


@dataclass(frozen=True)
class Verdict:
    """What is to be done about a step that was refused."""

    policy: GuardPolicy
    reason: str


class Guard:
    """Judges the steps of one run; equal on all ranks, for it sees only what is.

    Args:
        config: limits and policies.
        state: of the run; its newest losses and norms are the measure, and are kept up to date.
    """

    def __init__(self, config: GuardConfig, state: TrainState) -> None:
        self._config, self._state = config, state
        self._in_a_row = 0
        self._returns: dict[int, int] = {}

    def find_spike(self, loss: float, grad_norm: float) -> str:
        """What is unusual about a step before its update; empty: nothing.

        Args:
            loss: mean over the trained tokens of the global batch.
            grad_norm: before clipping, finite.
        """
        config, state = self._config, self._state
        if config.spike == "off" or len(state.losses) < config.window:
            return ""
        usual = statistics.median(state.losses)
        deviation = _TO_DEVIATION * statistics.median(abs(value - usual) for value in state.losses)
        limit = usual + config.loss_deviations * max(deviation, 1e-3 * abs(usual))
        if not math.isfinite(loss) or loss > limit:
            return f"loss {loss:.4g} over {limit:.4g} (median {usual:.4g} of {config.window} steps)"
        usual = statistics.median(state.grad_norms)
        if grad_norm > config.norm_factor * usual:
            return (
                f"gradient norm {grad_norm:.4g} over {config.norm_factor:g} x {usual:.4g}, the median of {config.window} steps"
            )
        return ""

    def judge(self, loss: float, grad_norm: float, *, applied: bool, finite: bool) -> Verdict | None:
        """Take one step in; every step, in order.

        Args:
            loss: of the step.
            grad_norm: of the step.
            applied: whether it was updated on.
            finite: whether its gradients were finite.

        Returns:
            What is to be done; None after a good step.

        Raises:
            GuardError: the policy ends the run, or too many steps were refused in a row.
        """
        config, state = self._config, self._state
        if applied:
            self._in_a_row = 0
            if config.spike != "off":
                state.losses = (*state.losses, loss)[-config.window :]
                state.grad_norms = (*state.grad_norms, grad_norm)[-config.window :]
            return None
        self._in_a_row += 1
        reason = self.find_spike(loss, grad_norm) if finite else "gradients are not finite"
        policy: GuardPolicy = config.non_finite if not finite or config.spike == "off" else config.spike
        where = f"step {state.step + 1}, batch {state.next_batch()}: {reason}"
        if policy == "stop":
            raise GuardError(f"{where}; the guard's policy is to stop: look at the rows, then go on with another policy")
        if self._in_a_row > config.max_in_a_row:
            raise GuardError(f"{where}; more than guard.max_in_a_row {config.max_in_a_row} refused in a row: the run is broken")
        return Verdict(policy, where)

    def count_return(self, step: int) -> None:
        """Count a rollback to the checkpoint of a step.

        Raises:
            GuardError: too many to the same one.
        """
        self._in_a_row = 0
        self._returns[step] = self._returns.get(step, 0) + 1
        if self._returns[step] > self._config.max_in_a_row:
            raise GuardError(
                f"guard: back at step {step} for the {self._returns[step]}th time, over guard.max_in_a_row "
                f"{self._config.max_in_a_row}: leaving out rows does not help; go back further, or lower the learning rate"
            )

    def left_out_with(self, batch: int) -> tuple[int, ...]:
        """The batches to leave out once that of the refused step is, too."""
        first = max(0, batch - self._config.rollback_batches + 1)
        return tuple(sorted({*self._state.left_out, *range(first, batch + 1)}))
