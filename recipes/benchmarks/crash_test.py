"""Kill a training run many times and compare its final weights, bit for bit, with those of an uninterrupted run.

    python recipes/benchmarks/crash_test.py --kills 20 --dataset path/to/books
    python recipes/benchmarks/crash_test.py --kills 5 --loop

Sends SIGKILL to recipes/pretrain.py (`--loop`: recipes/pretrain_loop.py) at random moments, some of them during its
start or a save, and restarts it with `--resume_from_checkpoint auto`. Without `--dataset` the text is the embedded
tales, few enough for an epoch to end in between. Dropout is on and gradients are accumulated.

Prints the kills, the resumes, the steps repeated (those after the last complete checkpoint) and the steps lost (if a
resume started before the last complete checkpoint). The exit code is 1 if a step was lost or a weight differs.
"""

import importlib.util
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from common import make_parser, print_result

from hf_minigpt.training.checkpoints import sealing
from hf_minigpt.training.checkpoints.signals import StopSignals


RECIPES = Path(__file__).parents[1]


def load_recipe(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


def run_recipe(recipe: ModuleType, flags: list[str], log: Path, reports: int) -> None:
    """Run the recipe in its own process and report where it resumes and each step that it finishes."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    requested, resolve = StopSignals.requested, sealing._resolve

    def report_step(self) -> bool:
        os.write(reports, b"step\n")
        return requested(self)

    def report_resume(*args) -> str | None:
        checkpoint = resolve(*args)
        os.write(reports, f"{step_of(checkpoint)}\n".encode())
        return checkpoint

    StopSignals.requested, sealing._resolve = report_step, report_resume
    recipe.main(flags)


@dataclass
class Run:
    """A recipe in one output folder, started as often as needed."""

    recipe: ModuleType
    output_dir: Path
    flags: list[str]
    resumes: int = 0
    steps_lost: int = 0
    steps_repeated: int = 0
    reached: int = 0
    lines: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.newest = step_of(sealing.newest_sealed(self.output_dir))
        self._reports, reports = os.pipe()
        os.set_blocking(self._reports, False)
        self.log = self.output_dir.parent / f"{self.output_dir.name}.log"
        flags = [*self.flags, "--output_dir", str(self.output_dir), "--resume_from_checkpoint", "auto"]
        # forked, so that a process trains for most of its life instead of importing; torch has not run here yet
        process = multiprocessing.get_context("fork").Process(
            target=run_recipe, args=(self.recipe, flags, self.log, reports)
        )
        process.start()
        os.close(reports)
        self.process, self.lines = process, []

    def poll(self) -> int | None:
        """Return the steps done since this start; None before the recipe knows where it resumes."""
        while True:
            try:
                read = os.read(self._reports, 1 << 16)
            except BlockingIOError:
                break
            if not read:
                break
            self.lines += read.decode().split()
        return len(self.lines) - 1 if self.lines else None

    def is_saving(self) -> bool:
        folders = list(self.output_dir.glob("checkpoint-*"))
        return any(not (folder / sealing.MANIFEST).exists() for folder in folders)

    def finish(self) -> None:
        """Wait for the end of the process and count what it did."""
        self.process.join()
        self.poll()
        os.close(self._reports)
        if self.process.exitcode not in (0, -9):
            sys.exit(f"the recipe failed with exit code {self.process.exitcode}:\n{self.log.read_text()[-3000:]}")
        if self.lines:
            resumed_at = int(self.lines[0])
            self.resumes += resumed_at > 0
            self.steps_lost += max(0, self.newest - resumed_at)
            self.steps_repeated += max(0, min(self.reached, resumed_at + len(self.lines) - 1) - resumed_at)
            self.reached = max(self.reached, resumed_at + len(self.lines) - 1)

    def kill(self, after: str, seconds: float, saves: int = 1) -> bool:
        """Kill it some seconds after its start, its first step or the start of a save; False if it ended first."""
        deadline, was_saving = None, False
        while self.process.is_alive():
            is_saving = bool(self.poll()) and self.is_saving()
            saves -= is_saving and not was_saving
            was_saving = is_saving
            has_started = {"start": True, "step": bool(self.poll()), "save": saves <= 0}[after]
            if deadline is None and has_started:
                deadline = time.monotonic() + seconds
            if deadline is not None and time.monotonic() >= deadline:
                self.process.kill()
                return True
            time.sleep(0.0005)
        return False


@dataclass
class Durations:
    """Seconds of an uninterrupted run."""

    start: float
    step: float
    save: float


def measure(run: Run) -> Durations:
    run.start()
    began, saving, num_saves, was_saving = time.monotonic(), 0.0, 0, False
    first = last = now = began
    steps = None
    while run.process.is_alive():
        time.sleep(0.0005)
        before, now = now, time.monotonic()
        if run.poll() != steps:
            steps, last = run.poll(), now
            first = now if steps == 1 else first
        is_saving = run.is_saving()
        num_saves += is_saving and not was_saving
        saving, was_saving = saving + is_saving * (now - before), is_saving
    run.finish()
    return Durations(first - began, (last - first) / run.reached, saving / num_saves)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--dataset", help="as in recipes/pretrain.py; default: the embedded tales")
    parser.add_argument("--loop", action="store_true", help="recipes/pretrain_loop.py instead of recipes/pretrain.py")
    parser.add_argument("--recipe", type=Path, help="another script with main(argv)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=5)
    parser.add_argument("--seed", type=int, help="of the random moments; default: a new one each time")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe or RECIPES / ("pretrain_loop.py" if args.loop else "pretrain.py"))
    rng = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as work:
        flags = ["--max_examples", "400"] if args.dataset is None else ["--dataset", args.dataset]
        flags += ["--cache_dir", f"{work}/cache", "--context_length", "64", "--per_device_train_batch_size", "8"]
        flags += ["--gradient_accumulation_steps", "2", "--max_steps", str(args.steps), "--use_cpu", "True"]
        flags += ["--config_overrides", "attn_pdrop=0.1", "resid_pdrop=0.1", "hidden_size=64", "num_hidden_layers=2"]
        flags += ["--save_steps", str(args.save_steps), "--save_total_limit", "2", "--validation_fraction", "0.02"]
        flags += ["--eval_steps", str(args.steps), "--cpu_threads", "1"]

        uninterrupted = Run(recipe, Path(work, "uninterrupted"), flags)
        seconds = measure(uninterrupted)
        print(
            f"uninterrupted: {uninterrupted.reached} steps of {seconds.step:.3f} s, a checkpoint every "
            f"{args.save_steps}, complete after {seconds.save:.3f} s"
        )
        killed = Run(recipe, Path(work, "killed"), flags)
        kills = kills_while_saving = 0
        while kills < args.kills:
            killed.start()
            after = ("save", "step", "save", "step", "start")[kills % 5]
            longest = {"start": seconds.start, "step": 2.5 * args.save_steps * seconds.step, "save": seconds.save}[
                after
            ]
            was_killed = killed.kill(after, rng.uniform(0, longest), saves=rng.choice([1, 2]))
            saving = killed.is_saving()
            killed.finish()
            if not was_killed:
                break
            kills += 1
            kills_while_saving += saving
        killed.start()
        killed.finish()

        final = [Path(run.output_dir, "model.safetensors").read_bytes() for run in (uninterrupted, killed)]
        identical = final[0] == final[1]
        result = {
            "kills": kills,
            "kills_while_saving": kills_while_saving,
            "resumes": killed.resumes,
            "steps": killed.reached,
            "steps_repeated": killed.steps_repeated,
            "steps_lost": killed.steps_lost,
            "identical": identical,
        }
    print(
        f"{kills} kills ({kills_while_saving} left a checkpoint unfinished), {killed.resumes} resumes, "
        f"{killed.steps_repeated} steps repeated, {killed.steps_lost} lost; "
        f"final weights {'identical' if identical else 'DIFFER'}"
    )
    print_result(**result)
    sys.exit(0 if identical and killed.steps_lost == 0 else 1)


if __name__ == "__main__":
    main()
