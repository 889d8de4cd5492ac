"""Two hosts on this machine: network namespaces with names and addresses of their own, joined by one cable.

They share the file system. A command on a host runs in a process namespace, so that all its processes die at once, as
those of a machine without power.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[2]
INTERFACE = "veth0"
PORT = 29500


class Unavailable(RuntimeError):
    """This machine does not allow network namespaces. The message is the reason."""


class Host:
    """A network namespace with the name `host-NUMBER` and the address `10.77.0.NUMBER`."""

    def __init__(self, number: int, neighbour: "Host | None" = None):
        self.number = number
        self.address = f"10.77.0.{number}"
        # without root, all hosts live in the user namespace of the first
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        unshare = ["unshare", *([] if neighbour else as_root), "--net", "--uts"]
        script = f"hostname host-{number} && ip link set lo up && echo ready && exec sleep 900"
        into = neighbour.enter("--user") if neighbour and as_root else []
        self._keeper = subprocess.Popen(
            [*into, *unshare, "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = self._keeper.stdout.readline().strip()
        if said != "ready":
            self.close()
            raise Unavailable(said or "unshare failed")
        self.running: list[subprocess.Popen] = []

    def enter(self, *namespaces: str) -> list[str]:
        """The beginning of a command that runs in this host's namespaces."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        names = user if namespaces == ("--user",) else [*user, "--net", "--uts"]
        return ["nsenter", "--target", str(self._keeper.pid), *names]

    def ip(self, *words: str) -> None:
        result = subprocess.run([*self.enter(), "ip", *words], capture_output=True, text=True, check=False)
        if result.returncode:
            raise Unavailable(f"ip {' '.join(words)}: {result.stderr.strip()}")

    def start(self, *command: str, log: Path) -> subprocess.Popen:
        """Start a command from the repository's root; its output is added to `log`."""
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            # restarted processes must not find the addresses of dead ones
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with log.open("a") as file:
            process = subprocess.Popen(
                [*self.enter(), "unshare", "--pid", "--fork", "--kill-child", *command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.running.append(process)
        return process

    def torchrun(self, *arguments: str, log: Path, restarts: int = 0) -> subprocess.Popen:
        """Start one process of a run over both hosts, whose rendezvous is on the first."""
        is_first = int(self.number == 1)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        command += ["--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"10.77.0.1:{PORT}"]
        # there is no name server
        command += ["--rdzv_conf", f"is_host={is_first},join_timeout=120,read_timeout=10"]
        command += ["--local_addr", self.address]
        command += ["--max_restarts", str(restarts), "--monitor_interval", "0.2"]
        return self.start(*command, *arguments, log=log)

    def accelerate(self, *arguments: str, log: Path) -> subprocess.Popen:
        """Start one process of a run over both hosts with `accelerate launch`."""
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/launch/ddp.yaml"]
        command += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(self.number - 1)]
        command += ["--main_process_ip", "10.77.0.1", "--main_process_port", str(PORT)]
        return self.start(*command, *arguments, log=log)

    def connect(self, is_up: bool) -> None:
        """Plug the cable in or out."""
        self.ip("link", "set", INTERFACE, "up" if is_up else "down")

    def kill(self) -> None:
        """Kill all processes that were started here."""
        for process in self.running:
            process.kill()
            process.wait()
        self.running.clear()

    def close(self) -> None:
        self._keeper.kill()
        self._keeper.wait()
        self._keeper.stdout.close()


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """
    Raises:
        Unavailable: no namespaces here.
    """
    with contextlib.ExitStack() as stack:
        try:
            first = Host(1)
            stack.callback(first.close)
            second = Host(2, neighbour=first)
            stack.callback(second.close)
        except FileNotFoundError as error:
            raise Unavailable(str(error)) from error
        peer = ("peer", "name", INTERFACE, "netns", str(second._keeper.pid))
        first.ip("link", "add", INTERFACE, "type", "veth", *peer)
        for host in (first, second):
            host.ip("address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.connect(True)
            stack.callback(host.kill)
        yield first, second


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.02)
