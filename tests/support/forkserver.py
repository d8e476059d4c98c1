"""Programs as forks of one process that has imported all of fedhds: a site's imports alone cost eight CPU-seconds.

A fork is a process of its own, which tests signal by its id; its arguments, variables, folder and output are those that
were asked for. `programs.start` runs the installed script where a fork differs from it: in /proc/PID/cmdline, in the
memory that it shows, in the seed of its hashes, in variables that imports read, in the end of its interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
# What the programs import sooner or later, and the parts of it that libraries import when they are used; not pyarrow,
# which starts a thread.
MODULES = (
    *("fedhds.cli.toolbox", "fedhds_server.cli", "fedhds_server.app", "fedhds_server.health_command"),
    *("fedhds_client.cli", "fedhds_client.daemon", "fedhds_client.commands.adapter", "fedhds_client.commands.split"),
    *("accelerate", "alembic.command", "grpc_health.v1.health", "grpc_reflection.v1alpha.reflection", "hdbscan"),
    *("jinja2.ext", "jinja2.sandbox", "peft", "psycopg", "rouge_score.rouge_scorer", "s3fs"),
    *("safetensors.torch", "sklearn.cluster", "sklearn.decomposition", "sqlalchemy.dialects.postgresql.psycopg"),
    *("sqlalchemy.dialects.sqlite", "torch", "transformers", "transformers.models.auto.modeling_auto"),
    *("transformers.generation.utils", "transformers.models.llama.modeling_llama", "umap"),
    *("uvicorn.protocols.http.h11_impl", "uvicorn.lifespan.off"),
)
# A request in JSON, which is most of all the variables; Linux takes twice as much in one packet.
_MAX_REQUEST_BYTES = 100_000
# From <sched.h>.
_CLONE_NEWNET = 0x40000000


class Forked:
    """A forked program, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, words: list[str], pid: int, status: socket.socket) -> None:
        self.args = words
        self.pid = pid
        self.returncode: int | None = None
        self._status = status.detach()
        weakref.finalize(self, os.close, self._status)
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            # For several threads: once the status is read, the closed connection wakes the others.
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            with self._lock:
                if self.returncode is None:
                    answer = os.read(self._status, 64)
                    if not answer:
                        raise RuntimeError("the fork server has died")
                    self.returncode = int(answer)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the program has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)


class ForkServer:
    """The process that forks; it ends with the process that made it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self._stop)

    def start(
        self, words: list[str], environment: dict[str, str], output: IO[Any], errors: IO[Any], *, namespace: str = ""
    ) -> Forked:
        """Forks, and runs the Python file `words[0]` with the arguments behind it, maybe in a network namespace."""
        request = {"words": words, "environment": environment, "folder": os.getcwd(), "namespace": namespace}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            files = [output.fileno(), errors.fileno(), theirs.fileno()]
            socket.send_fds(self._control, [json.dumps(request).encode()], files)
        pid = ours.recv(64)
        if not pid:
            raise RuntimeError(f"the fork server has died; its exit status is {self._process.wait()}")
        return Forked(words, int(pid), ours)

    def _stop(self) -> None:
        self._control.close()
        self._process.wait()


def _prepare(control: int) -> None:
    """Imports everything. Raises RuntimeError if that starts a thread, which forks would lack, or leaves files open."""
    # Ctrl-C reaches the forks from the terminal, as they are in one group with the tests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in MODULES:
        importlib.import_module(module)
    if threading.active_count() != 1 or len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError(f"imports have started threads, Python's or others: {threading.enumerate()}")
    files = {int(name) for name in os.listdir("/proc/self/fd") if Path("/proc/self/fd", name).exists()}
    if left := files - {0, 1, 2, control}:
        raise RuntimeError(f"imports have left files open: {left}")
    gc.collect()
    # So that no collection of a fork copies the pages of what is here.
    gc.freeze()


def _serve(control: socket.socket) -> list[str]:
    """Forks until the tests' process closes its end; returns in forks alone, with the words that they run."""
    forks: dict[int, tuple[int, socket.socket]] = {}
    while True:
        poll = select.poll()
        for number in (control.fileno(), *forks):
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll():
            if number in forks:
                pid, status = forks.pop(number)
                os.close(number)
                # Nobody may want to know.
                with status, contextlib.suppress(BrokenPipeError):
                    status.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
                continue
            request, files, _, _ = socket.recv_fds(control, _MAX_REQUEST_BYTES, 3)
            if not request:
                # At once: forks alone end as programs do.
                os._exit(0)
            pid = os.fork()
            if not pid:
                control.close()
                for number, (_, status) in forks.items():
                    os.close(number)
                    status.close()
                os.close(files[2])
                return _become(**json.loads(request), output=files[0], errors=files[1])
            os.close(files[0])
            os.close(files[1])
            status = socket.socket(fileno=files[2])
            status.send(str(pid).encode())
            forks[os.pidfd_open(pid)] = (pid, status)


def _become(
    words: list[str], environment: dict[str, str], folder: str, namespace: str, output: int, errors: int
) -> list[str]:
    """Makes this fork what a program is when it begins."""
    import numpy as np

    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if namespace:
        with open(f"/run/netns/{namespace}") as file:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.chdir(folder)
    random.seed()
    np.random.seed()
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    return words


def _run(script: str) -> NoReturn:
    """Runs a script and ends as an interpreter does, but takes no module down, which costs most of a second."""
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, int):
            status = error.code
        elif error.code is not None:
            print(error.code, file=sys.stderr)
            status = 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        status = -signal.SIGINT
    except BaseException:  # noqa: BLE001 - the interpreter's own end is like this
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # As Python says that it could not print.
            status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    _control = int(sys.argv[1])
    _prepare(_control)
    _run(_serve(socket.socket(fileno=_control))[0])
