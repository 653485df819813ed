import logging

import pytest
import torch

from recbole_holo.errors import ConfigError
from recbole_holo.ops import backend, causal_conv1d, native
from recbole_holo.ops.backend import choose, kernel_status, report, set_backend

CPU = torch.zeros(1)
NO_KERNELS = backend._load_kernel("selective_scan")[0] is None


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch):
    monkeypatch.setattr(backend, "_chosen", {})
    monkeypatch.setattr(backend, "_used", {})
    monkeypatch.setattr(backend, "_said", set())


def test_automatic_choice_on_a_cpu():
    assert choose("selective_scan", CPU) == "native"
    for op in ("causal_conv1d", "state_space_dual", "mamba_block", "mamba2_block"):
        assert choose(op, CPU.bfloat16()) == "native"
    assert choose("selective_scan", CPU.double()) == "reference"


def test_reference_is_always_possible():
    set_backend("reference")
    for tensor in (CPU, OnCuda()):
        assert choose("selective_scan", tensor) == "reference"
        assert choose("state_space_dual", tensor) == "reference"
        assert choose("mamba2_block", tensor) == "composed"


def test_choices_are_logged_once(caplog):
    with caplog.at_level(logging.INFO, "recbole_holo"):
        for _ in range(3):
            choose("selective_scan", CPU)
            choose("selective_scan", CPU.double())
    assert [r.getMessage().split()[:2] for r in caplog.records] == [
        ["selective_scan:", "native"],
        ["selective_scan:", "reference"],
    ]
    assert "float64" in caplog.text


def test_report_names_versions():
    with backend.excluding("native"):
        choose("selective_scan", CPU)
    choose("selective_scan", CPU.double())
    numba, reference = report()["selective_scan"].split(", ")
    assert numba.startswith("numba 0.")
    assert reference == "reference"


def test_unknown_backend():
    with pytest.raises(ConfigError, match=r"backend: 'cudaa' .*did you mean cuda"):
        set_backend("cudaa")
    assert backend.get_backend() == "auto"


def test_cuda_backend_refuses_cpu_tensors():
    set_backend("cuda")
    with pytest.raises(ConfigError, match=r"backend: 'cuda' .*selective_scan was given a cpu tensor: move the model"):
        choose("selective_scan", CPU)


@pytest.mark.skipif(not NO_KERNELS, reason="mamba-ssm is installed")
def test_missing_kernels_are_said_once(caplog):
    with caplog.at_level(logging.WARNING, "recbole_holo"):
        for op in ("selective_scan", "mamba_block"):
            for dtype in (torch.float32, torch.bfloat16):
                assert choose(op, OnCuda(dtype)) in ("reference", "composed")
    (record,) = caplog.records
    assert "mamba-ssm is not usable" in record.getMessage()
    assert "pip install" in record.getMessage()
    set_backend("cuda")
    with pytest.raises(ConfigError, match=r"mamba-ssm is not usable.*pip install"):
        choose("selective_scan", OnCuda())


def test_cpu_backend_on_cuda_is_not_silent(caplog):
    set_backend("cpu")
    with caplog.at_level(logging.INFO, "recbole_holo"):
        assert choose("selective_scan", OnCuda()) == "reference"
        assert choose("causal_conv1d", OnCuda()) == "torch"
    assert caplog.text.count("device cuda") == 2


def test_kernels_do_not_take_double(monkeypatch):
    monkeypatch.setattr(backend, "_load_kernel", lambda op: (print, ""))
    assert choose("selective_scan", OnCuda(torch.float64)) == "reference"
    assert choose("selective_scan", OnCuda(torch.bfloat16)) == "mamba-ssm"
    assert choose("causal_conv1d", OnCuda()) == "causal-conv1d"
    set_backend("cuda")
    with pytest.raises(ConfigError, match=r"do not take torch.float64"):
        choose("selective_scan", OnCuda(torch.float64))


def test_rounding_of_products_is_said(monkeypatch, caplog):
    """Triton multiplies float32 in TF32 unless told otherwise."""
    monkeypatch.setattr(backend, "_load_kernel", lambda op: (print, ""))
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)  # which the CUDA tests set for their process
    with caplog.at_level(logging.INFO, "recbole_holo"):
        for op in ("selective_scan", "mamba_block", "mamba2_block", "state_space_dual"):
            choose(op, OnCuda(torch.bfloat16))
        assert "TF32" not in caplog.text
        choose("mamba2_block", OnCuda())
        assert "mamba2_block: float32 is multiplied in TF32; TRITON_F32_DEFAULT=ieee" in caplog.text
        caplog.clear()
        monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
        choose("state_space_dual", OnCuda())
        assert "TF32" not in caplog.text


def test_no_compiler_is_said_and_replaced(monkeypatch, caplog):
    monkeypatch.setattr(native, "problem", lambda: "the C++ kernels are not usable: no C++ compiler found")
    with caplog.at_level(logging.WARNING, "recbole_holo"):
        assert choose("selective_scan", CPU) == "numba"
        assert choose("mamba_block", CPU) == "composed"
    assert caplog.text.count("no C++ compiler found") == 1
    assert kernel_status()["native"] == "the C++ kernels are not usable: no C++ compiler found"


def test_broken_numba_is_said_and_replaced(monkeypatch, caplog):
    monkeypatch.setattr(native, "problem", lambda: "the C++ kernels are not usable: no C++ compiler found")
    monkeypatch.setattr(backend, "_numba_problem", lambda: "numba is not usable: ImportError: broken")
    with caplog.at_level(logging.WARNING, "recbole_holo"):
        assert choose("selective_scan", CPU) == "reference"
        assert choose("causal_conv1d", CPU) == "torch"
    assert caplog.text.count("ImportError: broken") == 1
    assert kernel_status()["numba"] == "numba is not usable: ImportError: broken"
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    torch.testing.assert_close(causal_conv1d(x, weight)[:, 0], x[:, 0] * weight[:, -1])


def test_broken_kernels_keep_their_reason(monkeypatch):
    def fail(module):
        raise AttributeError("module 'tvm_ffi' has no attribute 'x'")

    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    monkeypatch.setattr(backend.importlib, "import_module", fail)
    function, reason = backend._load_kernel.__wrapped__("selective_scan")
    assert function is None
    assert reason == "mamba-ssm is not usable: AttributeError: module 'tvm_ffi' has no attribute 'x'"


def test_status_has_a_version_or_a_reason_for_each():
    status = kernel_status()
    assert list(status) == ["mamba-ssm", "causal-conv1d", "native", "numba"]
    assert status["native"] == "compiled"
    assert status["numba"].startswith("numba 0.")
    for name in ("mamba-ssm", "causal-conv1d"):
        assert status[name].startswith(name)
