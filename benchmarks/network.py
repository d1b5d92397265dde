"""A training step over two hosts: the Trainer against torch.distributed.pipelining on slow links.

The hosts are two network namespaces of this machine, joined by a veth pair that is held to 1 Gbit/s
or to 100 Mbit/s each way (`tc`'s tbf; with a delay of 250 us where the kernel has netem). Each has
one process of one thread of either side. The driver and Dask's scheduler are on the first host, and
share its link. Otherwise this is measured as the `pipeline` benchmark is. The `_sent` figures are
what the link carried in a step, both ways together: were it less on our side, values would have
come another way, since these "hosts" share their memory, and that is an error.

This needs Linux, the right to make namespaces (root), and ip, tc, nsenter, setpriv and unshare.
Without them it says so, and measures nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks._cases import make
from benchmarks._report import Report, arguments
from benchmarks._sides import OURS, ROUNDS, THEIRS, Side, measure, opened, ours, ranks

# Megabits a second, each way.
RATES = {"1gbit": 1000, "100mbit": 100}
CASES = {"transformer": "transformer_small", "resnet50": "resnet50_small"}
ROWS = {f"{model}_{rate}": (case, rate) for model, case in CASES.items() for rate in RATES}

LINK = "link0"  # on both hosts
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DELAY = "250us"
# Round trips, and for how long bytes are sent, to time the link.
PING_PONGS, PROBE_S = 200, 0.3


class Unavailable(Exception):
    """Namespaces cannot be made here, for this reason."""


class Hosts:
    """Two network namespaces and the link between them.

    They have no names, so they are gone when the last process in them is; and every process that
    is started with `prefixes` ends with this one, however that ends.
    """

    def __init__(self) -> None:
        missing = [
            tool for tool in ("ip", "tc", "nsenter", "setpriv", "unshare") if not shutil.which(tool)
        ]
        if missing:
            raise Unavailable(f"there is no {', '.join(missing)}")
        self._holders: list[subprocess.Popen[bytes]] = []
        self.delayed = False
        try:
            for _ in ADDRESSES:
                self._holders.append(_hold_namespace())
            first, second = (str(holder.pid) for holder in self._holders)
            ends = [LINK, "netns", first, "type", "veth", "peer", "name", LINK, "netns", second]
            _check(["ip", "link", "add", *ends])
            for prefix, address in zip(self.prefixes, ADDRESSES, strict=True):
                _check([*prefix, "ip", "address", "add", f"{address}/24", "dev", LINK])
                for name in ("lo", LINK):
                    _check([*prefix, "ip", "link", "set", name, "up"])
            for rate in RATES:
                self.hold_to(rate)
        except BaseException:
            self.close()
            raise

    @property
    def prefixes(self) -> list[list[str]]:
        """For each host what comes before a command that is to run there."""
        return [
            ["setpriv", "--pdeathsig", "TERM", "nsenter", f"--net=/proc/{holder.pid}/ns/net"]
            for holder in self._holders
        ]

    def hold_to(self, rate: str) -> None:
        """Limit the link, each way."""
        limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        for prefix in self.prefixes:
            add = [*prefix, "tc", "qdisc", "add", "dev", LINK]
            subprocess.run([*add[:-3], "del", "dev", LINK, "root"], capture_output=True)
            delay = [*add, "root", "handle", "1:", "netem", "delay", DELAY, "limit", "10000"]
            self.delayed = subprocess.run(delay, capture_output=True).returncode == 0
            _check([*add, *(["parent", "1:1"] if self.delayed else ["root"]), *limit])

    def carried(self) -> int:
        """The bytes that the link has carried, both ways together."""
        show = [*self.prefixes[0], "ip", "-json", "-statistics", "link", "show", LINK]
        [found] = json.loads(_check(show))
        return sum(int(found["stats64"][way]["bytes"]) for way in ("rx", "tx"))

    def close(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()


def _hold_namespace() -> subprocess.Popen[bytes]:
    """A process in a new network namespace. It ends when this one does: that ends its input."""
    holder = subprocess.Popen(
        ["unshare", "--net", "cat"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process, which then closes the others
    )
    outside = os.readlink("/proc/self/ns/net")
    while holder.poll() is None:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{holder.pid}/ns/net") != outside:
                return holder
        time.sleep(0.01)
    assert holder.stderr is not None
    raise Unavailable(holder.stderr.read().decode().strip())


def _check(command: list[str]) -> str:
    """Run a command; what it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


# -- the speed of the link -----------------------------------------------------------------------


def answer_probe() -> None:
    """On the first host: send back single bytes, then receive many and say when they are here."""
    with socket.create_server((ADDRESSES[0], 5000)) as server:
        print("ready", flush=True)
        peer, _ = server.accept()
        with peer:
            for _ in range(PING_PONGS):
                peer.sendall(peer.recv(1))
            left = int.from_bytes(peer.recv(8, socket.MSG_WAITALL))
            while left:
                left -= len(peer.recv(min(left, 1 << 20)))
            peer.sendall(b"!")


def probe(count: int) -> None:
    """On the second host: print the seconds of a round trip, and of sending so many bytes."""
    with socket.create_connection((ADDRESSES[0], 5000)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        start = time.perf_counter()
        for _ in range(PING_PONGS):
            peer.sendall(b"?")
            peer.recv(1)
        round_trip = (time.perf_counter() - start) / PING_PONGS
        start = time.perf_counter()
        peer.sendall(count.to_bytes(8) + bytes(count))
        peer.recv(1)
        print(json.dumps([round_trip, time.perf_counter() - start]))


def _time_link(report: Report, hosts: Hosts, rate: str) -> None:
    """Report what the link really does."""
    count = int(RATES[rate] * 1e6 / 8 * PROBE_S)
    script = [sys.executable, "-m", "benchmarks.network"]
    answering = subprocess.Popen(
        [*hosts.prefixes[0], *script, "--answer"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert answering.stdout is not None
        answering.stdout.readline()
        probing = [*hosts.prefixes[1], *script, "--probe", str(count)]
        found = subprocess.run(probing, check=True, stdout=subprocess.PIPE, text=True).stdout
    finally:
        answering.terminate()
        answering.wait()
    round_trip, seconds = json.loads(found)
    report.value(f"link_{rate}", 8e-6 * count / seconds, "Mbit/s")
    report.value(f"link_{rate}_round_trip", round_trip, "s")


# -- the training --------------------------------------------------------------------------------


@contextlib.contextmanager
def _cluster(hosts: Hosts) -> Iterator[str]:
    """A scheduler on the first host, a worker on each; the scheduler's address."""
    address = f"tcp://{ADDRESSES[0]}:8786"
    dask = [sys.executable, "-m", "dask"]
    commands = [[*hosts.prefixes[0], *dask, "scheduler", "--host", ADDRESSES[0], "--port", "8786"]]
    for i, (prefix, host) in enumerate(zip(hosts.prefixes, ADDRESSES, strict=True)):
        command = [*prefix, *dask, "worker", address, "--host", host, "--nthreads", "1"]
        commands.append([*command, "--name", f"host{i}"])
    # Workers import what the driver does: `resnet` is one of the examples.
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "DASK_LOGGING__DISTRIBUTED": "warning"}
    processes = [
        subprocess.Popen([*command, "--no-dashboard"], env=environment) for command in commands
    ]
    try:
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _measure(report: Report, hosts: Hosts, row: str, rounds: int) -> None:
    case, rate = ROWS[row]
    hosts.hold_to(rate)
    if f"link_{rate}" not in report.figures:
        _time_link(report, hosts, rate)
    prefixes = hosts.prefixes
    with _cluster(hosts) as scheduler:
        sides = {"ours": Side(ours(case, scheduler), prefixes=prefixes[:1])}
        for port, (side, keep) in enumerate({"torch": False, "torch_our_allocator": True}.items()):
            sides[side] = Side(
                ranks(case, ADDRESSES[0], 29500 + port, keep_memory=keep),
                prefixes=prefixes,
                environment={"GLOO_SOCKET_IFNAME": LINK},
            )
        with opened(sides):
            measure(report, row, make(case), sides, rounds)
            steps = make(case).steps
            sent = {}
            for side, schedules in {"ours": OURS, "torch": THEIRS}.items():
                before = hosts.carried()
                sides[side].step(schedules[0], steps)
                sent[side] = (hosts.carried() - before) / steps
                report.value(f"{row}_{side}_{schedules[0]}_sent", sent[side] / 1e6, "MB")
    report.show()
    if sent["ours"] < 0.9 * sent["torch"]:
        raise RuntimeError(f"{row}: values of ours have not passed the link between the hosts")


def main() -> None:
    """Measure, print, write."""
    options = arguments("network", __doc__, rows=tuple(ROWS), rounds=ROUNDS)
    report = Report("network")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        hosts = Hosts()
    except Unavailable as why:
        print(f"no network namespaces can be made here, so nothing is measured: {why}")
        report.finish(options.json)
        return
    try:
        for row in options.rows:
            _measure(report, hosts, row, options.rounds)
    finally:
        hosts.close()
        report.finish(options.json)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--answer"]:
            answer_probe()
        case ["--probe", count]:
            probe(int(count))
        case _:
            main()
