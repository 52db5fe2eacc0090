"""The build of the kernels: who builds, where, and what is done where it fails.

Where a compiler has to run, a small extension in C stands in for the kernels, and a script for the
compiler, which counts its calls, or stops at one, before it hands over to the machine's own.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from op import extension, fused_leaky_relu, upfirdn2d

CUDA = torch.device("cuda", 0)
FORK = multiprocessing.get_context("fork")  # forks of this process need not import torch


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])  # restored afterwards: a build extends it
    monkeypatch.delenv("PFGM_FUSED_OPS", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    caches = extension._trusted, extension._module
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


class CudaTensor:
    is_cuda, device = True, CUDA


class Wrong:
    """Kernels whose sums lack a tap."""

    def upfirdn2d(self, *arguments):
        return torch.tensor([3.0])

    def fused_leaky_relu(self, *arguments):
        return torch.full((4,), -0.5)


class Right(Wrong):
    def upfirdn2d(self, *arguments):
        return torch.tensor([4.0])


class TestFallback:
    """When the kernels are used, and what is said where they are not."""

    @pytest.fixture(autouse=True)
    def probe_on_the_cpu(self, monkeypatch):
        probe = extension._probe
        monkeypatch.setattr(extension, "_probe", lambda module, _: probe(module, "cpu"))

    def test_on_the_cpu_nothing_is_built_or_said(self, monkeypatch, caplog):
        monkeypatch.setattr(extension, "_module", lambda: pytest.fail("built"))
        fused_leaky_relu(torch.ones(1, 1, 4, 4), torch.ones(1))
        upfirdn2d(torch.ones(1, 1, 4, 4), torch.ones(2, 2))
        assert extension.kernels(torch.ones(1)) is None
        assert not caplog.records

    def test_no_compiler_warns_once(self, monkeypatch, caplog, tmp_path):
        def load(**_):
            raise RuntimeError("Error building extension:\n[1/3] nvcc\nsh: error: nvcc not found\n")

        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.setattr("torch.utils.cpp_extension.load", load)
        for _ in range(3):
            assert extension.kernels(CudaTensor) is None
        (record,) = caplog.records
        assert record.getMessage().endswith("CUDA kernels: sh: error: nvcc not found")

    def test_all_sources_are_given_and_nothing_is_left_of_a_failure(self, monkeypatch, tmp_path):
        builds = []
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.setattr(
            "torch.utils.cpp_extension.load", lambda **options: builds.append(options)
        )
        extension.kernels(CudaTensor)
        extension.kernels(CudaTensor)
        (options,) = builds
        named = {Path(source) for source in options["sources"]}
        assert named == {p for p in (ROOT / "op").iterdir() if p.suffix in (".cu", ".cpp")}
        assert [path.name for path in tmp_path.glob("*/*")] == ["lock"]

    @pytest.mark.parametrize("module, used", [(Right(), True), (Wrong(), False)])
    def test_a_launch_comes_first(self, monkeypatch, caplog, module, used):
        monkeypatch.setattr(extension, "_module", lambda: module)
        assert extension.kernels(CudaTensor) is (module if used else None)
        messages = [record.getMessage() for record in caplog.records]
        assert used or "the kernels compute [3.0, -0.5, " in messages[0]
        assert len(messages) == (not used)

    def test_a_launch_that_fails_says_why(self, monkeypatch, caplog):
        class OfAnotherGpu:
            def upfirdn2d(self, *arguments):
                raise RuntimeError("CUDA error: no kernel image is available\nfor execution")

        monkeypatch.setattr(extension, "_module", OfAnotherGpu)
        assert extension.kernels(CudaTensor) is None
        assert caplog.records[0].getMessage().endswith("CUDA error: no kernel image is available")

    def test_switched_off(self, monkeypatch, caplog):
        monkeypatch.setenv("PFGM_FUSED_OPS", "0")
        assert not extension.enabled(CudaTensor) and extension.kernels(CudaTensor) is None
        assert not caplog.records

    def test_import_builds_nothing(self):
        code = "import sys, op; assert 'torch.utils.cpp_extension' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_place_in_the_cache_tells_what_the_kernels_are_made_of(monkeypatch, tmp_path):
    checkout = tmp_path / "op"
    shutil.copytree(ROOT / "op", checkout)
    monkeypatch.setattr(extension, "FOLDER", checkout)
    (checkout / "notes.md").write_text("not compiled")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (8, 0))
    marks = [extension._fingerprint()]

    def changed(target, name, value):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            marks.append(extension._fingerprint())

    changed(extension, "FOLDER", ROOT / "op")
    changed(torch.cuda, "device_count", lambda: 1)
    assert marks.pop() == marks.pop() == marks[0]  # another checkout or number of GPUs: the same
    changed(extension, "FLAGS", ["-O2"])
    changed(torch, "__version__", "2.14.0")
    changed(torch.version, "cuda", "12.8")
    changed(torch.cuda, "get_device_capability", lambda gpu: (9, gpu))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    marks.append(extension._fingerprint())
    for source in ("upfirdn2d.h", "convert.cuh", "binding.cpp", "fused_leaky_relu.cu"):
        with open(checkout / source, "a") as file:
            file.write("\n")
        marks.append(extension._fingerprint())
    assert len(set(marks)) == len(marks) == 10


SOURCE = """
#include <Python.h>
static PyObject* number(PyObject*, PyObject*) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"number", number, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "pfgm_op", "", -1, methods};
PyMODINIT_FUNC PyInit_pfgm_op() { return PyModule_Create(&module); }
"""

# A log gets a line for every call that compiles or links. That which $STOP names writes half of its
# output and does not end.
COMPILER = """#!/bin/sh
call=ask
case "$*" in *" -c "*) call=compile ;; *-shared*) call=link ;; esac
for output in "$@"; do :; done
[ $call = ask ] || echo $call >> {log}
[ "$STOP" != $call ] || [ $call = ask ] || echo half > "$output"
[ "$STOP" != $call ] || exec sleep 100
exec c++ "$@"
"""


def number():
    """The stand-in's number, of the build of this process or another's; None where it fails."""
    try:
        return extension._module().number()
    except Exception:
        return None


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """`checkout(n)`: from here on the sources are those of a module whose `number()` is n."""
    for program in ("c++", "ninja"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")

    def make(n):
        folder = tmp_path / f"checkout{n}"
        folder.mkdir(exist_ok=True)
        (folder / "module.cpp").write_text(SOURCE % n)
        monkeypatch.setattr(extension, "FOLDER", folder)

    import torch.utils.cpp_extension  # noqa: F401  before the processes are forked

    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(log=tmp_path / "log"))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "SOURCES", ("module.cpp",))
    make(1)
    return make


def calls(tmp_path):
    """'compile' or 'link' for every such call of the compiler so far."""
    log = tmp_path / "log"
    return log.read_text().split() if log.exists() else []


def in_a_process(function):
    with FORK.Pool(1) as pool:
        return pool.apply(function)


def test_eight_processes_build_once(checkout, tmp_path):
    with FORK.Pool(8) as pool:
        results = [pool.apply_async(number) for _ in range(8)]
        assert [result.get(200) for result in results] == [1] * 8
    assert calls(tmp_path) == ["compile", "link"]


def test_two_checkouts_have_their_own_kernels(checkout, tmp_path):
    assert in_a_process(number) == 1
    checkout(2)
    assert in_a_process(number) == 2
    checkout(1)
    assert in_a_process(number) == 1  # kept
    assert calls(tmp_path) == ["compile", "link"] * 2


@pytest.mark.parametrize("moment", ["ask", "compile", "link"])
def test_a_killed_build_costs_the_next_start_its_own_build(checkout, tmp_path, monkeypatch, moment):
    """The killed build's compiler was not killed, and still runs."""
    monkeypatch.setenv("STOP", moment)
    killed = FORK.Process(target=lambda: os.setsid() or number())
    killed.start()
    wait_until(lambda: any((tmp_path / "cache").glob("*/build-*")))
    if moment != "ask":
        wait_until(lambda: moment in calls(tmp_path))
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    monkeypatch.delenv("STOP")
    try:
        assert in_a_process(number) == 1
        assert sorted(p.name for p in tmp_path.glob("cache/*/*")) == ["lock", "pfgm_op.so"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(killed.pid, signal.SIGKILL)


def wait_until(condition):
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_failed_build_leaves_the_next_start_its_own(checkout, tmp_path):
    module = tmp_path / "checkout1/module.cpp"
    good = module.read_text()
    module.write_text(good + "no C++\n")
    assert in_a_process(number) is None
    module.write_text(good)
    assert in_a_process(number) == 1


def test_a_damaged_library_is_built_anew(checkout, tmp_path):
    assert in_a_process(number) == 1
    (library,) = tmp_path.glob("cache/*/pfgm_op.so")
    library.write_bytes(library.read_bytes()[:100])
    assert in_a_process(number) is None
    assert in_a_process(number) == 1
