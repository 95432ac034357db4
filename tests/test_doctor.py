"""What doctor makes of machines that are not here."""

from importlib.metadata import PackageNotFoundError

import pytest

from skyrun.tools import doctor


@pytest.fixture
def machine(monkeypatch):
    """machine(system, triton, capability) pretends to be one with a GPU; triton: its version or None."""

    def pretend(system, triton, capability):
        def version(package):
            if package == ("triton-windows" if system == "Windows" else "triton") and triton:
                return triton
            raise PackageNotFoundError(package)

        monkeypatch.setattr(doctor, "version", version)
        monkeypatch.setattr(doctor, "query", lambda fields: capability)
        monkeypatch.setattr(doctor.platform, "system", lambda: system)

    return pretend


@pytest.mark.parametrize(
    ("system", "triton", "capability", "verdict", "found", "remedy"),
    [
        ("Linux", "3.9.0", "8.6", "good", "Triton 3.9.0, compute capability 8.6", ""),
        ("Windows", "3.7.1", "12.0", "good", "Triton 3.7.1, compute capability 12.0", ""),
        ("Linux", "3.6.0", "", "good", "Triton 3.6.0", ""),
        ("Linux", "3.9.0", "7.5", "slow", "Triton's kernels need 8.0", "RTX 3000"),
        ("Linux", None, "8.9", "slow", "Triton is not installed", 'pip install "triton>='),
        ("Windows", None, "8.9", "slow", "Triton is not installed", 'pip install "triton-windows>='),
    ],
)
def test_kernels(machine, system, triton, capability, verdict, found, remedy):
    machine(system, triton, capability)
    finding = doctor._kernels("NVIDIA GeForce RTX 3060, 12288 MiB, 11000 MiB, 580.1")
    assert finding.verdict == verdict
    assert found in finding.found
    assert remedy in finding.remedy


def test_kernels_without_a_gpu(machine):
    machine("Linux", None, "")
    assert doctor._kernels("").verdict == "good"


def test_a_container_has_less_memory(monkeypatch):
    monkeypatch.setattr(doctor, "memory", lambda: (8 << 30, 6 << 30))
    finding = doctor._ram()
    assert finding.verdict == "slow"
    assert "6.0 of 8.0 GiB free" in finding.found


@pytest.mark.parametrize(
    ("system", "gpu", "verdict", "found"),
    [("Linux", "card", "good", "Linux"), ("Windows", "card", "slow", "memory moves to RAM"), ("WSL", "", "good", "WSL")]
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


@pytest.mark.parametrize(("rate", "verdict"), [(2e9, "good"), (0.1e9, "slow"), (0.0, "good")])
def test_disks(monkeypatch, tmp_path, rate, verdict):
    (tmp_path / "r2v-Q8_0").mkdir()
    (tmp_path / "r2v-Q8_0" / "model.gguf").touch()
    monkeypatch.setattr(doctor, "disk_rate", lambda path: rate)
    finding = doctor._disk(tmp_path)
    assert finding.verdict == verdict
    assert ("not measured" in finding.found) is (rate == 0)
