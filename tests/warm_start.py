"""Starts main.py in forks of one process that has imported all that it imports.

A start of Python takes seconds for imports that no test of a run is about. A fork takes
milliseconds, and is a process of its own in all that a test sees: arguments, environment, folder,
signals, standard output and error, exit status. What is about the start itself (imports,
launchers, signals during imports) starts Python anew: `conftest.run_program`.

    python3 tests/warm_start.py serve CONNECTION             the process that is forked
    python3 tests/warm_start.py CONNECTION SCRIPT [...]      a start for a shell's script
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAIN = [sys.executable, str(ROOT / "main.py")]
IMPORTS = ("run_lib", "configs.default", "configs.effects", "sklearn.datasets", "torch._dynamo")
LONGEST_MESSAGE = 2**17  # bytes, of a start's arguments and environment

_server = None


def run_main(
    arguments: list, expect: int = 0, processes: int = 1, environment: dict | None = None
) -> subprocess.CompletedProcess:
    """Runs `main.py` with `arguments`, as `Program` does, to its end; asserts its exit status."""
    return Program([*MAIN, *arguments], processes, environment).finish(expect)


class Program:
    """A started script, of one thread, that is used as a `subprocess.Popen`.

    Args:
        command: the interpreter, which is not started, the script's path or -c and its text, its
            arguments.
        processes: how many at once, as one job, with the variables that torchrun sets for each; or
            the variables of each, as another launcher sets them.
        environment: variables besides those of this process.
        cwd: folder; None for that of this process.
        start_new_session: whether signals to its process group reach this process and its own only.
    """

    def __init__(
        self,
        command: list,
        processes: int | list[dict] = 1,
        environment: dict | None = None,
        cwd: Path | None = None,
        start_new_session: bool = False,
    ):
        self.args = [*map(str, command)]
        self.returncode = None
        self._outputs = [*map(tempfile.TemporaryFile, ("w+", "w+"))]
        common = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        ranks = processes if isinstance(processes, list) else _rank_variables(processes)
        request = {
            "command": self.args,
            "environments": [common | variables for variables in ranks],
            "folder": str(cwd or os.getcwd()),
            "start_new_session": start_new_session,
        }
        with open(os.devnull) as stdin:
            streams = [file.fileno() for file in (stdin, *self._outputs)]
            self._connection = _sent(request, server(), streams)
        self.pids = json.loads(self._connection.recv(LONGEST_MESSAGE))

    @property
    def pid(self) -> int:
        """Number of the first process."""
        return self.pids[0]

    def wait(self, timeout: float | None = None) -> int:
        """Exit status of the first process that failed, or 0; `TimeoutExpired` after seconds."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = _status(self._connection)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and error after its end; it is killed after `timeout` seconds."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        texts = []
        for file in self._outputs:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return tuple(texts)

    def finish(self, expect: int = 0) -> subprocess.CompletedProcess:
        """Waits for its end; asserts its exit status."""
        stdout, stderr = self.communicate(timeout=300)
        assert self.returncode == expect, stdout + stderr
        return subprocess.CompletedProcess(self.args, expect, stdout, stderr)

    def send_signal(self, number: int) -> None:
        """Sends a signal to all processes, unless they have ended."""
        if self.poll() is None:
            for process in self.pids:
                os.kill(process, number)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


def server() -> socket.socket:
    """Connection to the server of this process, which is started at the first call.

    It may be inherited, by a shell that is to start scripts through it.
    """
    global _server
    if _server is None:
        _server, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end:
            process = subprocess.Popen(
                [sys.executable, __file__, "serve", str(server_end.fileno())],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[server_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        atexit.register(process.wait)
        atexit.register(_server.close)  # called first; it ends the server
    return _server


def _rank_variables(processes: int) -> list[dict]:
    """Variables by which each of several processes of a job knows its number, and the others."""
    if processes == 1:
        return [{}]
    job = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    job["TORCHELASTIC_RUN_ID"] = "warm"
    jobs = [job | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{name: str(value) for name, value in variables.items()} for variables in jobs]


def free_port() -> int:
    """A TCP port of this host that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _sent(request: dict, to: socket.socket, streams: list[int]) -> socket.socket:
    """Socket on which the server answers: numbers of the processes, then exit statuses."""
    connection, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with server_end:
        socket.send_fds(to, [json.dumps(request).encode()], [*streams, server_end.fileno()])
    return connection


def _status(connection: socket.socket) -> int:
    statuses = json.loads(connection.recv(LONGEST_MESSAGE))
    return next((status for status in statuses if status), 0)


def _start_for_a_shell(connection: int, command: list[str]) -> None:
    """Starts a script whose streams, environment and folder are those of this process."""
    request = {"command": command, "environments": [dict(os.environ)], "folder": os.getcwd()}
    answers = _sent(request, socket.socket(fileno=connection), [0, 1, 2])
    answers.recv(LONGEST_MESSAGE)
    sys.exit(_status(answers))


# --- the server -----------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> dict:
    """Forks for each request a process that starts the program's; returns in the latter."""
    signal.signal(signal.SIGCHLD, _bury)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, LONGEST_MESSAGE, 4)
        if not message:  # the tests have ended
            os._exit(0)
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            return _start(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _bury(*_) -> None:
    """Takes note of the children that ended, so that their seconds count as this process's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _start(request: dict, descriptors: list[int]) -> dict:
    """Returns in each process of the request; tells their numbers, then their exit statuses."""
    *streams, last = descriptors
    connection = socket.socket(fileno=last)
    processes = []
    for environment in request["environments"]:
        process = os.fork()
        if not process:
            connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return request | {"environment": environment}
        processes.append(process)
    connection.send(json.dumps(processes).encode())
    statuses = [os.waitpid(process, 0)[1] for process in processes]
    connection.send(json.dumps([*map(os.waitstatus_to_exitcode, statuses)]).encode())
    os._exit(0)


def _become_a_program(connection: int) -> None:
    """Serves; each fork runs the script that it is asked for."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a suite started by nohup ignores
    sys.path[0] = str(ROOT)
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what a fork's collections leave alone, it need not copy
    request = _serve(socket.socket(fileno=connection))
    if request.get("start_new_session"):
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.orig_argv = request["command"]
    sys.argv = request["command"][1:]
    try:
        if sys.argv[0] == "-c":
            text = sys.argv.pop(1)
            exec(text, {"__name__": "__main__"})
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        _end(end.code or 0)
    _end(0)


def _end(status: int) -> None:
    """End as the interpreter does, but leave its objects to the system.

    To free each of them takes a fork a third of a second, since it copies every page it writes to.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _become_a_program(int(sys.argv[2]))
    else:
        _start_for_a_shell(int(sys.argv[1]), [sys.executable, *sys.argv[2:]])
