"""Streams that fail, signals, devices and memory: work goes on, or one line says why."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import execution
from configs import command_line
from library.signals import stop_signals
from reports import streams
from reports.progress import progress_bar

# --- standard streams -----------------------------------------------------------------------------


@contextlib.contextmanager
def lenient(descriptor, encoding="utf-8"):
    """A text stream on a descriptor, made by `make_lenient`."""
    raw = streams._Lenient(descriptor, "w", closefd=False)
    with io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace"
    ) as stream:
        yield stream


def test_a_pipe_whose_reader_ends_takes_everything_after():
    reader, writer = os.pipe()
    with lenient(writer) as stream:
        print("first", file=stream, flush=True)
        assert os.read(reader, 100) == b"first\n"
        os.close(reader)
        print("second" * 10**5, file=stream, flush=True)
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_takes_everything():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with lenient(descriptor) as stream:
        for _ in range(3):
            print("line", file=stream, flush=True)
    os.close(descriptor)


def test_a_slow_reader_that_does_not_block_loses_nothing():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    count = ["-c", "import sys; print(len(sys.stdin.buffer.read()))"]
    with subprocess.Popen([sys.executable, *count], stdin=reader, stdout=subprocess.PIPE) as count:
        os.close(reader)
        with lenient(writer) as stream:
            stream.write("x" * 10**6)
        os.close(writer)
        assert int(count.stdout.read()) == 10**6


def test_letters_that_an_encoding_lacks_are_escaped(tmp_path):
    with open(tmp_path / "out", "wb") as file, lenient(file.fileno(), "ascii") as stream:
        stream.write("Fréchet, caf\udce9, 数")
    assert (tmp_path / "out").read_text() == r"Fr\xe9chet, caf\udce9, \u6570"


CLOSED = """
import os, sys
from reports import streams
streams.make_lenient()
print("lost")
print("lost", file=sys.stderr)
assert [os.path.samestat(os.fstat(i), os.stat(os.devnull)) for i in range(3)] == 3 * [True]
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    os.write(1, b"of a library"), os.write(2, b"of a library")
    file.write("whole")
"""


def test_no_file_takes_the_place_of_closed_streams(tmp_path):
    command = [sys.executable, "-c", CLOSED, str(tmp_path / "file")]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    done = subprocess.run([*shell, *command], cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize("redirect", ["| head -1", ">/dev/full", "2>/dev/full", "2>&-", ">&-"])
def test_the_program_answers_whoever_listens(redirect):
    """A mistake keeps its exit status, and there is no traceback."""
    command = f'{sys.executable} main.py --mode=none 2>"$0" {redirect}; echo status $?'
    command = command.replace('2>"$0"', "") if redirect.startswith("2") else command
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}", "/dev/stderr"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "status 2", done.stdout
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_library_without_stderr_shows_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(total=2) as progress:
        progress.update(2)


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [("SIGHUP",), ("SIGHUP", "SIGHUP"), ("SIGTERM", "SIGHUP", "SIGHUP")]
)
def test_a_closed_terminal_asks_to_stop_however_often_it_says_so(sent):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    try:
        with stop_signals() as stop:
            for name in sent:
                os.kill(os.getpid(), signal.Signals[name])
                time.sleep(0.01)
            assert stop() == sent[0]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop() is None
    finally:
        signal.signal(signal.SIGHUP, before)


# --- devices and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:3", "cuda:999"])
def test_a_device_that_is_not_there_is_one_line_with_a_way_out(name):
    if torch.cuda.device_count() > 3 and name == "cuda:3":
        pytest.skip("it is there")
    with pytest.raises(
        ValueError, match=rf"device='{name}' cannot be used: .*; there is .*: "
    ) as e:
        execution.named_device(name)
    assert str(e.value).endswith("device=auto takes a GPU where there is one, else the CPU")
    assert "\n" not in str(e.value)


def allocate_too_much():
    torch.empty(2**60, dtype=torch.uint8)


def raise_error(error):
    raise error


@pytest.mark.parametrize(
    "work, says",
    [
        (allocate_too_much, "^error: out of memory: .*can't allocate memory"),
        (lambda: raise_error(MemoryError()), "^error: out of memory: .* MemoryError$"),
        (lambda: bytearray(2**62), "^error: out of memory: "),
        (lambda: raise_error(torch.OutOfMemoryError("CUDA out of memory.")), "out of memory: "),
        (lambda: raise_error(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")), "out of memory: "),
        (lambda: float(10**400), "^error: a number is too large: int too large to convert"),
        (lambda: (2.0**600) ** 2, "^error: a number is too large: "),
    ],
)
def test_what_a_machine_cannot_hold_is_one_line(work, says, capsys):
    with pytest.raises(SystemExit) as ended, command_line.one_line_errors():
        work()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(says, error.strip())


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), command_line.one_line_errors():
        raise RuntimeError("shapes do not match")
