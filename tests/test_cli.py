"""The command line: help, usage errors, and a doctor that reports every kind of broken install."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types

import pytest
import torch

import foveate
from foveate import _dispatch, _native, cli, doctor


def report(capsys) -> dict:
    assert cli.main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def fresh_loads(monkeypatch):
    """What has been loaded so far is forgotten for the test."""
    monkeypatch.setattr(_dispatch, "_LOADED", {})
    _native.load_native.cache_clear()
    yield
    _native.load_native.cache_clear()


def _refuse_import(monkeypatch, name: str, error: Exception) -> None:
    real = importlib.import_module

    def import_module(path, package=None):
        if path == name:
            raise error
        return real(path, package)

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: foveate" in shown
    for command in cli._COMMANDS:
        assert command in shown
        assert cli.main([command, "--help"]) == 0
        assert f"usage: foveate {command}" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"foveate {foveate.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["--bad"], ["doctor", "--bad"]])
def test_bad_usage_exits_2_and_prints_the_usage(capsys, arguments):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: foveate" in captured.err


def test_the_module_runs_as_a_script_and_survives_a_closed_pipe():
    command = [sys.executable, "-m", "foveate", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
    usage = subprocess.run([sys.executable, "-m", "foveate", "--bad"], capture_output=True)
    assert usage.returncode == 2
    assert b"Traceback" not in usage.stderr


def test_doctor_reports_every_backend_of_every_family_and_op(capsys):
    found = report(capsys)
    assert found["versions"]["foveate"] == foveate.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == set(_dispatch.families())
    for family, backends in found["backends"].items():
        assert tuple(backends) == _dispatch.BACKENDS
        for backend, state in backends.items():
            assert isinstance(state, dict), f"{family}.{backend}: {state}"
            assert state["status"]
            assert list(state["ops"]) == _dispatch.OPS.get(family, [])
            assert all(isinstance(status, str) for status in state["ops"].values())
        assert backends["reference"]["status"] == doctor.CAN_RUN
    assert found["backends"]["analog_bits"]["cpu"]["ops"]["bits_encode"] == doctor.CAN_RUN


def test_doctor_text_says_the_same_as_its_json(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    found = report(capsys)
    for version in found["versions"].values():
        assert version in shown
    for family, backends in found["backends"].items():
        assert family in shown
        for state in backends.values():
            assert state["status"] in shown
    for line in found["advice"]:
        assert line in shown
    assert max(map(len, shown.splitlines())) <= 400
    assert shown.isascii()


def test_doctor_counts_one_openmp_runtime():
    # In a process of its own: other packages, as scikit-learn, bring a copy of the runtime.
    command = [sys.executable, "-m", "foveate", "doctor", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    threads = json.loads(shown)["threads"]
    assert threads["torch"] >= 1
    if sys.platform == "linux":
        assert threads["runtime"].startswith("one libgomp: /")
    else:
        assert threads["runtime"].startswith("unknown")


def test_doctor_tells_two_openmp_runtimes_apart(monkeypatch, tmp_path, capsys):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 0 08:01 1    /env/torch/lib/libgomp.so.1\n"
        "7f01-7f02 r--p 0 08:01 1    /env/torch/lib/libgomp.so.1\n"
        "7f03-7f04 r-xp 0 08:01 2    /env/foveate.libs/libgomp-a34b3233.so.1.0.0\n"
    )
    monkeypatch.setattr(doctor, "_MAPS", maps)
    found = report(capsys)
    assert found["threads"]["runtime"].startswith("two libgomp: ")
    assert any("auditwheel --exclude libgomp.so.1" in line for line in found["advice"])


def test_doctor_on_a_system_without_proc(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "_MAPS", tmp_path / "absent")
    assert report(capsys)["threads"]["runtime"].startswith("unknown")


@pytest.mark.usefixtures("fresh_loads")
def test_doctor_without_the_cpu_module(monkeypatch, capsys):
    error = ModuleNotFoundError("No module named 'foveate._cpu'", name="foveate._cpu")
    _refuse_import(monkeypatch, "foveate._cpu", error)
    found = report(capsys)
    for state in found["backends"]["analog_bits"]["cpu"]["ops"].values():
        assert state == "foveate._cpu was not built; reinstall foveate with a C++20 compiler"
    assert "was not built" in found["isa"]
    assert any(line.startswith("CPU kernels: reinstall") for line in found["advice"])


@pytest.mark.usefixtures("fresh_loads")
def test_doctor_with_a_cpu_module_that_does_not_load(monkeypatch, capsys):
    _refuse_import(monkeypatch, "foveate._cpu", ImportError("undefined symbol: omp_get_num"))
    status = report(capsys)["backends"]["analog_bits"]["cpu"]["status"]
    assert status == "foveate._cpu does not load: undefined symbol: omp_get_num"


@pytest.mark.usefixtures("fresh_loads")
@pytest.mark.parametrize("error", [ImportError("libcuda"), OSError("libcuda"), RuntimeError("bad")])
def test_doctor_with_a_triton_that_does_not_load(monkeypatch, capsys, error):
    _refuse_import(monkeypatch, "triton", error)
    found = report(capsys)
    assert str(error) in found["backends"]["analog_bits"]["triton"]["status"]
    assert str(error) in found["versions"]["triton"]
    assert found["backends"]["analog_bits"]["cpu"]["status"] == doctor.CAN_RUN


@pytest.mark.usefixtures("fresh_loads")
def test_doctor_without_triton(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *p: None if name == "triton" else real(name, *p)
    )
    _refuse_import(monkeypatch, "triton", ModuleNotFoundError("No module named 'triton'"))
    monkeypatch.setattr(importlib.metadata, "version", _no_package)
    found = report(capsys)
    assert found["versions"]["triton"] == "not installed"
    assert found["backends"]["analog_bits"]["triton"]["status"] == "triton is not installed"
    if sys.platform == "linux":
        assert "Triton kernels: pip install 'triton>=3.6'" in found["advice"]


def _no_package(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize("cuda", [types.SimpleNamespace(), None])
def test_doctor_without_torch_cuda(monkeypatch, capsys, cuda):
    monkeypatch.setattr(torch, "cuda", cuda)
    found = report(capsys)
    assert "AttributeError" in found["devices"]["cuda"]
    assert found["backends"]["analog_bits"]["cpu"]["status"] == doctor.CAN_RUN


def test_doctor_when_the_driver_raises(monkeypatch, capsys):
    def fail():
        raise RuntimeError("CUDA driver\ninitialization failed")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    found = report(capsys)
    assert "CUDA driver initialization failed" in found["devices"]["cuda"]
    assert "unknown" in found["backends"]["analog_bits"]["triton"]["status"]


def test_doctor_on_a_cpu_build_of_torch_says_where_to_get_another(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = report(capsys)
    assert found["devices"]["cuda"] == "none: this torch is a CPU build"
    assert any("CUDA build of torch" in line for line in found["advice"])


def test_doctor_lists_the_missing_packages_of_an_extra(monkeypatch, capsys):
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ['no-such-dist>=3; extra == "bench"']
    )
    found = report(capsys)
    assert found["extras"]["bench"] == ["no-such-dist"]
    assert "no-such-dist: pip install 'foveate[bench]'" in found["advice"]


def test_doctor_survives_a_broken_family(monkeypatch, capsys):
    monkeypatch.setattr(_dispatch, "missing_kernels", lambda *_: int("not a number"))
    found = report(capsys)
    status = found["backends"]["analog_bits"]["reference"]["status"]
    assert status.startswith("unknown (ValueError")
