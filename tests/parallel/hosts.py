"""Hosts that are network namespaces of this machine: each with an address and a name of its own, and a cable between.

Ranks on two of them share no memory, so that what they tell each other crosses the cable.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from processes import LIMIT, descendants, find_mpirun, surroundings

from apts_mpi.doctor.diagnosis import family_of_launcher

ADDRESSES = ("10.231.0.1", "10.231.0.2")
INTERFACE = "eth0"

# UCX knows by the machine, not by the host's name, whose memory it shares.
OVER_THE_CABLE = {"UCX_TLS": "tcp", "FI_PROVIDER": "tcp"}

REMOTE_SHELL = """\
#!/bin/sh
# What the launcher calls instead of ssh: [options] HOST COMMAND...
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
case $host in
HOSTS
esac
exec nsenter --target "$process" --net --uts sh -c "exec $*"
"""


def run(*words):
    """Run a command; return what it printed."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def only_child(process):
    """Number of the process that a process starts, now or soon."""
    wait_until(lambda: descendants(process.pid), LIMIT)
    return descendants(process.pid)[-1]


class Host:
    """A network with a name, held by a process of which ``processes`` is the namespace."""

    def __init__(self, address, processes):
        self._enter = ["nsenter", "--target", str(processes), "--pid"]
        self._keeper = subprocess.Popen([*self._enter, "unshare", "--net", "--uts", "sleep", "infinity"])
        self.process = only_child(self._keeper)
        wait_until(lambda: self._network() != os.readlink("/proc/self/ns/net"), LIMIT)
        run(*self.on("hostname", address))

    def _network(self):
        return os.readlink(f"/proc/{self.process}/ns/net")

    def on(self, *words):
        """The command that runs another one on this host."""
        return [*self._enter, "nsenter", "--target", str(self.process), "--net", "--uts", *words]

    def processes(self):
        """Numbers of the processes on this host, but for the one that holds it."""
        found, network = [], self._network()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # one that ended meanwhile, or is only waited for
                if os.readlink(place / "ns" / "net") == network and int(place.name) != self.process:
                    found.append(int(place.name))
        return found

    def wait(self):
        """Wait until the host is no more."""
        self._keeper.wait(LIMIT)


class Hosts:
    """Two hosts and their cable, from making to `remove`; they end with all their processes where this one ends."""

    def __init__(self, directory):
        self._directory = directory
        self._jobs = []
        kept = ["unshare", "--kill-child", "--fork", "--pid", "sleep", "infinity"]
        self._keeper = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *kept])
        first = only_child(self._keeper)
        self.hosts = [Host(address, first) for address in ADDRESSES]
        ends = [["name", INTERFACE, "netns", str(host.process)] for host in self.hosts]
        run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host, address in zip(self.hosts, ADDRESSES, strict=True):
            run(*host.on("ip", "addr", "add", f"{address}/24", "dev", INTERFACE))
            run(*host.on("ip", "link", "set", "lo", "up"))
            run(*host.on("ip", "link", "set", INTERFACE, "up"))
        # The system takes up to a second to see that both ends are; in a network without a running interface MPI_Init
        # fails on one rank, for which the others wait.
        assert all(wait_until(lambda host=host: self._link(host)["operstate"] == "UP", LIMIT) for host in self.hosts)
        places = zip(ADDRESSES, self.hosts, strict=True)
        cases = "\n".join(f"{address}) process={host.process} ;;" for address, host in places)
        self._shell = directory / "remote_shell"
        self._shell.write_text(REMOTE_SHELL.replace("HOSTS", cases))
        self._shell.chmod(0o755)

    def start(self, ranks, arguments):
        """Start a training job from the first host with ``ranks`` on each; its output goes to ``output``."""
        places = ",".join(f"{address}:{ranks}" for address in ADDRESSES)
        launcher = [find_mpirun(), "-launcher", "ssh", "-launcher-exec", str(self._shell), "-hosts", places]
        command = [*launcher, "-n", str(2 * ranks), sys.executable, "-m", "apts_mpi.train", *arguments]
        with (self._directory / "output").open("w") as output:
            job = subprocess.Popen(
                self.hosts[0].on(*command),
                cwd=self._directory,
                env=surroundings(self._directory, **OVER_THE_CABLE),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._jobs.append(job)
        return job

    def output(self):
        """What the last job printed so far."""
        return (self._directory / "output").read_text()

    def sent(self):
        """Bytes that the first host has put on the cable."""
        return self._link(self.hosts[0])["stats64"]["tx"]["bytes"]

    def _link(self, host):
        """What the system knows of a host's end of the cable."""
        (link,) = json.loads(run(*host.on("ip", "-s", "-j", "link", "show", INTERFACE)))
        return link

    def cut(self):
        """Take the cable away for good."""
        for host in self.hosts:
            run(*host.on("ip", "link", "set", INTERFACE, "down"))

    def processes(self):
        """Numbers of the processes on the hosts."""
        return [number for host in self.hosts for number in host.processes()]

    def remove(self):
        """End what still runs on the hosts, and take them away."""
        self._keeper.kill()
        for process in (self._keeper, *self._jobs):
            process.wait(LIMIT)
        for host in self.hosts:
            host.wait()


def reason_against():
    """Why hosts cannot be made here; empty if they can."""
    if find_mpirun() is None:
        return "needs mpirun"
    if family_of_launcher(run(find_mpirun(), "--version")) != "MPICH":
        return "needs the launcher of MPICH, whose remote shell can be replaced"
    for name in ("ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(name) is None:
            return f"needs the command {name}, of Debian's iproute2 or util-linux"
    made = subprocess.run(["unshare", "--fork", "--pid", "--net", "--uts", "true"], capture_output=True, text=True)
    return f"needs root with CAP_SYS_ADMIN for namespaces: {made.stderr.strip()}" if made.returncode else ""


def wait_until(condition, limit):
    """Whether ``condition()`` became true within ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
