"""Stops a run on SIGTERM or SIGINT after the current step, with a checkpoint and exit code 75."""

import datetime
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..processes import print_once, world_size


# sysexits.h: EX_TEMPFAIL, "try again later"
EXIT_STOPPED = 75


class StopSignals:
    """Turns SIGTERM and SIGINT into a request to stop after the current step, during a block.

    A second signal ends the process at once, as without a handler (a shell shows 128 + its number). Signals within a
    second of the first count as the same request: a launcher forwards a signal that its process group has received
    already.

    Outside the main thread, where Python allows no handlers, signals are not handled.

    Args:
        timeout: seconds to wait for a process that no longer answers, such as one of a machine without power.
            Default: torch's 30 minutes.

    Attributes:
        agreed: the latest result of `requested`.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.agreed = False
        self._timeout = None if timeout is None else datetime.timedelta(seconds=timeout)
        self._signal: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        if world_size() > 1:
            # on the CPU, so that `requested` does not wait for the GPU
            self._group = dist.new_group(timeout=self._timeout, backend="gloo")
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._signal is not None and not self.agreed and error is None:
            # it came after the last call of `requested`
            signal.raise_signal(self._signal)

    def _handle(self, number: int, frame: Any) -> None:
        if self._signal is None:
            self._signal, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            text = f"\n{name}: stopping after this step with a checkpoint; a second signal stops at once.\n"
            # print is not reentrant
            os.write(2, text.encode())
        elif time.monotonic() - self._since > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def requested(self) -> bool:
        """Return whether to stop now. All processes must call this after each step and get the same result."""
        if self._group is None:
            self.agreed = self._signal is not None
        else:
            flag = torch.tensor(int(self._signal is not None))
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
            self.agreed = bool(flag)
        return self.agreed

    def exit_if_requested(self) -> None:
        """End the process with exit code 75 if the last `requested` was true."""
        if self.agreed:
            print_once("Stopped by a signal. Resume with --resume_from_checkpoint auto")
            raise SystemExit(EXIT_STOPPED)


class StopOnSignal(TrainerCallback):
    """Stops training with a checkpoint when a signal requests it."""

    def __init__(self, signals: StopSignals):
        self.signals = signals
        self._saved_step: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.signals.requested():
            control.should_training_stop = True
            # at the end of an epoch, logging and evaluation come before the checkpoint, as in an uninterrupted run
            control.should_save = control.should_save or not float(state.epoch).is_integer()

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.signals.agreed:
            return
        if float(state.epoch).is_integer() or state.global_step >= state.max_steps:
            control.should_save = self._saved_step != state.global_step
        else:
            # the epoch has not ended
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        self._saved_step = state.global_step
