"""What a check is, what it reports, and where it runs."""

import contextlib
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


class Skip(Exception):
    """Raised or yielded by a check that cannot run here. Its text is the reason. Nothing skipped counts as passed."""


@dataclass(frozen=True)
class Finding:
    """
    A figure with its bounds, and the same figure of a control: a variant that is broken on purpose.

    Args:
        name: what was compared.
        figure: must lie between `least` and `most`.
        control: figure of the broken variant, which must not lie there: a check that lets it pass proves nothing.
        broken: what is wrong with the control.
    """

    name: str
    figure: float
    most: float
    control: float
    broken: str
    least: float = 0.0
    detail: str = ""

    @property
    def verdict(self) -> str:
        if not self.least <= self.figure <= self.most:
            return "failed"
        # a control that is NaN is out of bounds, as it should be
        return "void" if self.least <= self.control <= self.most else "passed"


@dataclass(frozen=True)
class Measurement:
    """A figure for the record, without bounds."""

    name: str
    value: float | str
    unit: str = ""


@dataclass(frozen=True)
class Failure:
    """A part of a check that crashed, while the others go on."""

    detail: str


@dataclass(frozen=True)
class Machine:
    """
    Where the checks run: a GPU, or in a dry run the CPU in its place, with models of two narrow layers.

    Args:
        device: the device under test, compared with the CPU.
        folder: where checks may write.
    """

    device: torch.device
    folder: Path
    dry_run: bool = False

    @property
    def name(self) -> str:
        return "CPU, dry run" if self.dry_run else torch.cuda.get_device_name(self.device)

    def synchronize(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize(self.device)

    def empty_folder(self, name: str) -> Path:
        """Return a folder of this name without what an earlier run has left there."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir(parents=True)
        return self.folder / name

    def half_dtypes(self) -> list[torch.dtype]:
        """Return the 16-bit formats that the device computes in, the preferred one first."""
        if self.dry_run or torch.cuda.is_bf16_supported(including_emulation=False):
            return [torch.bfloat16, torch.float16]
        return [torch.float16]


Report = Finding | Measurement | Skip | Failure
CheckFunction = Callable[[Machine], Iterable[Report]]


@dataclass(frozen=True)
class Check:
    number: int
    title: str
    function: CheckFunction


CHECKS: dict[int, Check] = {}


def check(number: int, title: str) -> Callable[[CheckFunction], CheckFunction]:
    """Register a function that takes a `Machine` and yields what it finds."""

    def register(function: CheckFunction) -> CheckFunction:
        CHECKS[number] = Check(number, title, function)
        return function

    return register


def run_check(number: int, machine: Machine) -> Iterator[dict[str, Any]]:
    """
    Run a check, and yield its records as they come. A check that crashes has failed, and keeps what it found before.

    Returns:
        Dictionaries with `check`, `title`, `verdict` (passed, failed, void, skipped or measured), and the fields of
        the report.
    """
    chosen = CHECKS[number]
    head = {"check": number, "title": chosen.title}
    # another check may have changed it
    torch.set_float32_matmul_precision("highest")
    found = False
    for report in guarded("", chosen.function(machine)):
        found = True
        yield head | record(report)
    if not found:
        yield head | record(Failure("found nothing"))


def guarded(part: str, reports: Iterable[Report], memory: bool = False) -> Iterator[Report]:
    """
    Yield the reports of a part of a check, and its end if it crashes or cannot run here, so that others go on.

    Args:
        memory: whether a part that needs more memory than the device has is skipped instead of failed.
    """
    part = f"{part}: " if part else ""
    try:
        yield from reports
    except Skip as reason:
        yield Skip(f"{part}{first_line(reason)}")
    except (Exception, SystemExit) as error:
        if memory and isinstance(error, torch.OutOfMemoryError):
            yield Skip(f"{part}needs more memory than this device has")
            return
        traceback.print_exc()
        yield Failure(f"{part}{type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def record(report: Report) -> dict[str, Any]:
    if isinstance(report, Skip):
        return {"name": "", "verdict": "skipped", "detail": str(report)}
    if isinstance(report, Failure):
        return {"name": "", "verdict": "failed", "detail": report.detail}
    verdict = report.verdict if isinstance(report, Finding) else "measured"
    return {**asdict(report), "verdict": verdict}


def exit_code(records: Iterable[dict[str, Any]]) -> int:
    """Return 0 if something passed and nothing failed, else 1."""
    verdicts = {record["verdict"] for record in records}
    return 0 if "passed" in verdicts and not verdicts & {"failed", "void"} else 1


def line(record: dict[str, Any]) -> str:
    """Return a record as one line of text."""
    start = f"{record['check']:2} {record['verdict']:8} {record['name'] or record['title']}"
    if record["verdict"] == "measured":
        return f"{start}: {shown(record['value'])} {record['unit']}".rstrip()
    if "figure" in record:
        start += f": {shown(record['figure'])}, allowed {bounds(record)}; "
        start += f"control ({record['broken']}): {shown(record['control'])}"
    return f"{start}: {record['detail']}" if record.get("detail") else start


def shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if value == 0 or value != value:
        return "0" if value == 0 else "NaN"
    return f"{value:.2e}" if not 1e-2 <= abs(value) < 1e4 else f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"


def bounds(record: dict[str, Any]) -> str:
    most = f"{record['most']:.3g}"
    return f"{record['least']:.3g} to {most}" if record["least"] else f"at most {most}" if record["most"] else "0"


def markdown(records: list[dict[str, Any]], heading: str) -> str:
    """Return a heading and two Markdown tables: a row for each check with its worst figure, and the measurements."""
    rows = [f"## {heading}", "", "| | check | passed | closest to its bound | allowed | control |", "|-|-|-|-|-|-|"]
    for number in sorted({r["check"] for r in records}):
        own = [r for r in records if r["check"] == number and r["verdict"] != "measured"]
        if not own:
            continue
        passed = sum(r["verdict"] == "passed" for r in own)
        notes = [f"{r['verdict']}: {r['name'] or r['detail']}" for r in own if r["verdict"] != "passed"]
        cells = ["", "", ""]
        findings = [r for r in own if "figure" in r]
        if findings:
            worst = max(findings, key=distance)
            control = f"{shown(worst['control'])}: {worst['broken']}"
            cells = [f"{worst['name']}: {shown(worst['figure'])}", bounds(worst), control]
        cells = [number, own[0]["title"], "; ".join([f"{passed} of {len(findings)}", *notes]), *cells]
        rows.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    rows += ["", "| | measured | |", "|-|-|-|"]
    for r in records:
        if r["verdict"] == "measured":
            rows.append(f"| {r['check']} | {r['name']} | {shown(r['value'])} {r['unit']} |")
    return "\n".join(rows) + "\n"


def distance(record: dict[str, Any]) -> tuple[bool, float]:
    """Return a key that is the greater the nearer a figure is to its bounds, and greatest if it has not passed."""
    most, figure = record["most"], record["figure"]
    if record["least"]:
        # with two bounds, from the middle between them
        most, figure = (most - record["least"]) / 2, abs(figure - (most + record["least"]) / 2)
    return record["verdict"] != "passed", figure / most if most else figure


@contextlib.contextmanager
def attributes(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object, and restore them at the end."""
    saved = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(target, name, value)
