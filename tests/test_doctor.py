"""What doctor makes of machines that are not here."""

from importlib.metadata import PackageNotFoundError

import pytest

from skyrun import doctor


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
