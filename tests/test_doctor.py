"""What doctor makes of machines that are not here."""

import os
import subprocess
import sys

import pytest
import torch

from skyrun.errors import FAILED
from skyrun.kernels.machine import toolchain
from skyrun.planning.hardware import Tuned, disk_number, save_tuned
from skyrun.presets.machine.cards import Rates
from skyrun.tools import doctor
from skyrun.tools.convolution import measure_convolution


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(system, triton, capability, lacks) pretends to be one with a GPU.

    triton: its version or None. lacks: "gcc" or "Python.h", which are missing.
    """

    def pretend(system, triton, capability, lacks=""):
        def version(package):
            assert package == ("triton-windows" if system == "Windows" else "triton")
            return triton

        (tmp_path / "Python.h").touch() if lacks != "Python.h" else None
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(doctor, "version", version)
        monkeypatch.setattr(doctor, "query", lambda fields: capability)
        monkeypatch.setattr(toolchain, "find_spec", lambda package: triton)
        monkeypatch.setattr(toolchain.shutil, "which", lambda name: name if name == "gcc" != lacks else None)
        monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        monkeypatch.setattr(toolchain.platform, "system", lambda: system)

    return pretend


@pytest.mark.parametrize(
    ("system", "triton", "capability", "lacks", "verdict", "found", "remedy"),
    [
        ("Linux", "3.9.0", "8.6", "", "good", "Triton 3.9.0, compute capability 8.6, --attention exact, int8", ""),
        ("Windows", "3.7.1", "12.0", "gcc", "good", "capability 12.0, --attention exact, int8, full-int8, fp8", ""),
        ("Linux", "3.6.0", "", "", "good", "Triton 3.6.0", ""),
        ("Linux", "3.9.0", "7.5", "", "slow", "Triton's kernels need 8.0", "RTX 3000"),
        ("Linux", None, "8.9", "", "slow", "Triton is not installed", 'pip install "triton>='),
        ("Windows", None, "8.9", "", "slow", "Triton is not installed", 'pip install "triton-windows>='),
        ("Linux", "3.9.0", "8.9", "gcc", "slow", "Triton finds no C compiler", "apt install gcc"),
        ("Linux", "3.9.0", "8.9", "Python.h", "slow", "Triton finds no Python.h", "apt install python3-dev"),
    ],
)
def test_kernels(machine, system, triton, capability, lacks, verdict, found, remedy):
    machine(system, triton, capability, lacks)
    finding = doctor._kernels("NVIDIA GeForce RTX 3060, 12288 MiB, 11000 MiB, 580.1")
    assert finding.verdict == verdict
    assert found in finding.found
    assert remedy in finding.remedy


def test_kernels_without_a_gpu(machine):
    machine("Linux", None, "")
    assert doctor._kernels("").verdict == "good"


MEASURED = {"device": "cuda", "dtype": "bfloat16", "seconds": 1.0, "apart_seconds": 1.0, "error": 0.003}
MEASURED |= {"buffer": 10, "result": 10}


@pytest.mark.parametrize(
    ("measured", "verdict", "found"),
    [
        ({}, "good", "takes 1.00 of the time"),
        ({"seconds": 3.0}, "slow", "takes 3.00 of the time of 2-D ones: decoding takes longer"),
        ({"buffer": 270}, "slow", "a buffer of 27 times the result: decoding may run out of memory"),
        ({"error": 0.4}, "fails", "the result is 40% off"),
        ({"error": float("nan")}, "fails", "off"),
    ],
)
def test_convolutions(measured, verdict, found):
    finding = doctor.judge_convolution(MEASURED | measured)
    assert finding.verdict == verdict and found in finding.found
    assert ("torch" in finding.remedy) == (verdict != "good")


def test_a_convolution_is_measured(monkeypatch):
    measured = measure_convolution("cpu", (16, 24))
    assert measured.error < 1e-5 and min(measured.seconds, measured.apart_seconds) > 0
    convolution = torch.nn.functional.conv3d
    monkeypatch.setattr("torch.nn.functional.conv3d", lambda *given, **how: convolution(*given, **how) * 1.5)
    assert measure_convolution("cpu", (16, 24)).error == pytest.approx(0.5)


@pytest.mark.parametrize("code", ["raise ValueError('no such thing')", "import sys; sys.stdout.write('{')"])
def test_a_convolution_that_cannot_be_measured_is_no_failure(monkeypatch, code):
    monkeypatch.setattr(doctor, "_CONVOLUTION", code)
    finding = doctor._convolution()
    assert finding.verdict == "unknown" and finding.found.startswith("not measured: ")


def test_a_container_has_less_memory(monkeypatch):
    monkeypatch.setattr(doctor, "memory", lambda: (8 << 30, 6 << 30))
    finding = doctor._ram()
    assert finding.verdict == "slow"
    assert "6.0 of 8.0 GiB free" in finding.found


@pytest.mark.parametrize(
    ("system", "gpu", "verdict", "found"),
    [("Linux", "card", "good", "Linux"), ("Windows", "card", "slow", "spills VRAM to RAM"), ("WSL", "", "good", "WSL")]
    + [("WSL", "card", "slow", "page-locked")],
)
def test_systems_that_hide_a_full_gpu(monkeypatch, system, gpu, verdict, found):
    monkeypatch.setattr(doctor, "where", lambda: system)
    finding = doctor._system(gpu)
    assert (finding.verdict, found in finding.found) == (verdict, True)
    assert ("Sysmem Fallback" in finding.remedy) is (verdict == "slow")


def test_models_on_a_disk_of_windows(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "where", lambda: "WSL")
    monkeypatch.setattr(doctor, "free_space", lambda folder: 500 << 30)
    monkeypatch.setattr(doctor, "existing_folder", lambda folder: folder)
    assert doctor._space(tmp_path).verdict == "good"
    finding = doctor._space(doctor.Path("/mnt/c/models"))
    assert finding.verdict == "slow" and "SKYRUN_MODELS" in finding.remedy


def test_too_little_room_for_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "free_space", lambda folder: 10 << 30)
    finding = doctor._space(tmp_path / "not" / "there")
    assert finding.verdict == "slow" and "10 GiB free" in finding.found


@pytest.mark.parametrize(("rate", "verdict"), [(2e9, "good"), (0.1e9, "slow"), (0.0, "unknown")])
def test_disks(monkeypatch, tmp_path, rate, verdict):
    (tmp_path / "r2v-Q8_0").mkdir()
    (tmp_path / "r2v-Q8_0" / "model.gguf").touch()
    monkeypatch.setattr(doctor, "disk_rate", lambda path: rate)
    finding = doctor._disk(tmp_path, "cpu")
    assert finding.verdict == verdict
    assert ("not measured" in finding.found) is (rate == 0)
    assert (finding.remedy == "") is (verdict == "good")


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SKYRUN_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    return tmp_path / "cache"


def found(*subjects):
    """The findings on some subjects, of one examination: each takes seconds."""
    findings = {finding.subject: finding for finding in doctor.examine()}
    return [findings[subject] for subject in subjects]


def test_what_was_tuned_is_said_and_used(own_cache, tmp_path):
    assert [one.verdict for one in found("tuning", "disk")] == ["unknown", "unknown"]
    path = save_tuned("cpu", Tuned(Rates(1e12, 2e12, 0.0, 0.0, 3e12, 4e9), 0.0, {disk_number(tmp_path): 7e9}))
    tuning, disk = found("tuning", "disk")
    assert (tuning.verdict, str(path) in tuning.found) == ("good", True)
    assert (disk.verdict, disk.found) == ("good", "7.00 GB/s, measured by skyrun tune")
    path.write_text(path.read_text().replace("7", "8"))
    tuning, disk = found("tuning", "disk")
    assert (tuning.verdict, disk.verdict) == ("unknown", "unknown")
    assert "damaged" in tuning.found and "skyrun tune" in tuning.remedy


def topology(*states):
    """What `nvidia-smi topo -p2p r` prints for two GPUs."""
    return (
        "\tGPU0\tGPU1\t\n" + "".join(f" GPU{n}\t{s}\t\n" for n, s in enumerate(states)) + "\nLegend:\n\n  X    = Self\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("printed", "way"),
    [
        (topology("X\tOK", "OK\tX"), ", from card to card"),
        (topology("X\tCNS", "CNS\tX"), ", through the host's memory"),
        (topology("X\tOK", "NS\tX"), ", through the host's memory"),
        ("Invalid combination of input arguments.\n", ""),
        (None, ""),  # no nvidia-smi
    ],
)
def test_links_between_gpus(own_cache, tmp_path, monkeypatch, printed, way):
    if printed is not None:
        command = tmp_path / "nvidia-smi"
        lines = "\n".join(f"echo '{line}'" for line in printed.splitlines())
        command.write_text(f'#!/bin/sh\n[ "$*" = "topo -p2p r" ] || exit 1\n{lines}\n')
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    gpus, rates = "RTX 3060, 12288 MiB; RTX 3060, 12288 MiB", Rates(1e12, 2e12, 0.0, 0.0, 3e12, 4e9)
    assert (doctor._links(gpus).verdict, doctor._links(gpus).found) == ("unknown", f"2 GPUs{way}, not measured")
    save_tuned("cuda", Tuned(rates, 12e9, peer_rate=5.4e9))
    said = f"each of 2 GPUs sends another 5.4 GB/s{way}"
    assert (doctor._links(gpus).verdict, doctor._links(gpus).found) == ("good", said)


def test_what_is_kept_is_listed(own_cache):
    (cache,) = found("cache")
    assert cache.found == f"{own_cache}, empty"
    (own_cache / "prompts").mkdir(parents=True)
    (own_cache / "kernels-cpu.json").write_text("{}")
    (own_cache / "prompts" / "a.safetensors").write_bytes(bytes(5000))
    (own_cache / ".lock").touch()
    cache, models = found("cache", "models")
    assert cache.found == f"{own_cache}, 5 kB: kernels-cpu.json, prompt embeddings (1)"
    assert str(own_cache.with_name("models")) in models.found


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_folders_that_cannot_be_written(own_cache, tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert [one.verdict for one in found("cache", "models")] == ["slow", "fails"]
    finally:
        tmp_path.chmod(0o700)


def test_a_user_without_a_home_is_a_finding(tmp_path):
    """In a process of its own, as a container starts one: no HOME, and a user that no table knows."""
    code = """if True:
        import pwd, sys
        def unknown(uid): raise KeyError(uid)
        pwd.getpwuid = unknown
        from skyrun.cli import main
        code = main(sys.argv[1:])
        assert "torch" not in sys.modules
        sys.exit(code)
        """
    for arguments, inside in ((["doctor", "--json"], '"verdict": "fails"'), (["doctor"], "FAILS  models")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={"PATH": "", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == FAILED, done.stderr
        assert inside in done.stdout and "HOME is not set" in done.stdout and "SKYRUN_MODELS" in done.stdout
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "module",
    ["skyrun.tools.doctor", "skyrun.tools.inspect", "skyrun.planning.hardware", "skyrun.presets.machine.named"],
)
def test_what_must_be_quick_imports_no_torch(module):
    slow = {"torch", "av", "PIL", "rich"} if "named" not in module else {"torch", "psutil", "numpy"}
    code = f"import sys, {module}; sys.exit(', '.join({slow} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
