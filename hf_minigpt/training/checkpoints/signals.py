"""SIGTERM and SIGINT as a request to stop after the current step, with a checkpoint and exit code 75."""

import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from .sealing import say, world_size


# sysexits.h: EX_TEMPFAIL, "try again later"
EXIT_STOPPED = 75


class StopSignals:
    """Makes SIGTERM and SIGINT a request to stop after the current step, for the length of a block.

    A second signal ends the process at once, as if nobody had handled it (a shell shows 128 + its number). Signals
    within a second of the first are the same request: a launcher passes on what its process group has got already.

    In threads other than the main one, where Python allows no handlers, signals do what they did.

    Attributes:
        agreed: the latest answer of `requested`.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._signal: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        if world_size() > 1:
            # on the CPU, so that asking does not wait for the GPU
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._signal is not None and not self.agreed and error is None:
            # it came too late for a step to notice
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
        """Whether to stop now. All processes get the same answer, hence all ask after each step."""
        if self._group is None:
            self.agreed = self._signal is not None
        else:
            flag = torch.tensor(int(self._signal is not None))
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
            self.agreed = bool(flag)
        return self.agreed

    def exit_if_requested(self) -> None:
        """End the process with exit code 75 where `requested` was last answered with yes."""
        if self.agreed:
            say("Stopped by a signal. To go on: --resume_from_checkpoint auto")
            raise SystemExit(EXIT_STOPPED)


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint when `signals` ask for it."""

    def __init__(self, signals: StopSignals):
        self.signals = signals
        self._saved_step: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if self.signals.requested():
            control.should_training_stop = True
            # what is due at the end of an epoch comes before the checkpoint, as in a run that is not stopped
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
