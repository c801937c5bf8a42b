"""Two "nodes" on one machine: network namespaces joined by a veth pair whose ends send no faster than a given rate.

Nothing is made outside of a user namespace of its own, so that no rights are needed where the kernel lets users make these.
Namespaces last as long as a process is in them. One process holds each until :meth:`TwoNodes.__exit__`, or until whoever
started it has died.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

TOOLS = ("unshare", "nsenter", "setpriv", "ip", "tc")
INTERFACE = "ted0"
ADDRESSES = ("10.213.0.1", "10.213.0.2")


class NodesUnavailableError(RuntimeError):
    """This machine cannot have two such nodes; the message says what is missing."""


class TwoNodes:
    """A context: two network namespaces, each with an interface :data:`INTERFACE` and one of :data:`ADDRESSES`.

    Args:
        rate: Megabit per second that each end sends at most (token bucket filter).
        burst: Bytes that it may send at once; at least one packet of 64 KiB, because packets are cut only after the filter.
        queue_ms: Milliseconds' worth of bytes that may wait to be sent.

    Raises:
        NodesUnavailableError: On entering, if the machine cannot.

    """

    def __init__(self, rate: float = 1000.0, burst: int = 2**17, queue_ms: float = 10.0) -> None:
        self.shape = ["tbf", "rate", f"{rate:g}mbit", "burst", str(burst), "latency", f"{queue_ms:g}ms"]
        self._enter: list[list[str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> TwoNodes:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise NodesUnavailableError(
                f"the program{'s' * (len(missing) > 1)} {', '.join(missing)} (of util-linux and iproute2) must be on the PATH"
            )
        with ExitStack() as stack:
            first = self._hold(stack, ["unshare", "--map-root-user", "--net"])
            self._enter = [enter(first)]
            second = self._hold(stack, [*self._enter[0], "unshare", "--net"])
            self._enter.append(enter(second))
            self._join(second)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def within(self, node: int) -> list[str]:
        """What goes before a command that is to run in a node; the command dies with whoever starts it."""
        return [*self._enter[node], "setpriv", "--pdeathsig", "KILL"]

    def _hold(self, stack: ExitStack, within: Sequence[str]) -> int:
        """Make namespaces; the process that is in them ends with its input, which is to say with this process."""
        holder = subprocess.Popen(
            [*within, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        stack.callback(holder.communicate)
        assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
        try:
            holder.stdin.write("ready\n")
            holder.stdin.flush()
            said = holder.stdout.readline()
        except BrokenPipeError:
            said = ""
        if said != "ready\n":
            raise NodesUnavailableError(
                f"`{' '.join(within)}` makes no network namespace: {holder.stderr.read().strip()}"
            )
        return holder.pid

    def _join(self, second: int) -> None:
        link = ["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(second)]
        self._do(0, link)
        for node, address in enumerate(ADDRESSES):
            self._do(node, ["ip", "address", "add", f"{address}/30", "dev", INTERFACE])
            self._do(node, ["ip", "link", "set", "lo", "up"])
            self._do(node, ["ip", "link", "set", INTERFACE, "up"])
            self._do(node, ["tc", "qdisc", "add", "dev", INTERFACE, "root", *self.shape])

    def _do(self, node: int, command: Sequence[str]) -> None:
        done = subprocess.run([*self._enter[node], *command], capture_output=True, text=True)
        if done.returncode:
            raise NodesUnavailableError(f"`{' '.join(command)}` fails in a network namespace: {done.stderr.strip()}")


def enter(pid: int) -> list[str]:
    """What goes before a command that is to run in the namespaces of a process."""
    return ["nsenter", "--target", str(pid), "--user", "--preserve-credentials", "--net"]


def reason_for_none() -> str | None:
    """Why this machine can have no two nodes; None if it can."""
    try:
        with TwoNodes():
            return None
    except NodesUnavailableError as error:
        return str(error)


def sent_bytes() -> int:
    """What the interface of this process' node has sent until now, the network's own headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counts.split()[8])
    raise KeyError(INTERFACE)
