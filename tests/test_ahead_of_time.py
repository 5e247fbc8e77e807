"""What the kernels compile to on GPUs that are not here: registers, spills, shared memory, and which instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = (80, 90, 100)
SHARED = {80: 101_376, 90: 232_448, 100: 232_448}  # bytes a program may have; sm_80's row serves sm_86 and 89 too
TENSOR_CORES = {80: "hmma", 90: "wgmma", 100: "tcgen05"}
PRODUCTS = ("_product_kernel", "_gradient_kernel")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[int, list[dict]]:
    """The report of `ahead_of_time.py` for every capability, all three compiled at the same time."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("ahead_of_time.py")
    command = lambda sm: [sys.executable, str(script), str(sm)]  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = {sm: subprocess.Popen(command(sm), **pipes) for sm in CAPABILITIES}
    found = {}
    for sm, process in running.items():
        out, told = process.communicate()
        assert process.returncode == 0, told[-3000:]
        found[sm] = json.loads(out)
    return found


def of(kernels: list[dict], *names: str, case: str = "") -> list[dict]:
    some = [kernel for kernel in kernels if kernel["kernel"] in names and case in kernel["case"]]
    assert some, f"no {names} was compiled for {case!r}"
    return some


def label(kernel: dict) -> str:
    return f"{kernel['case']}: {kernel['kernel']}"


@pytest.mark.parametrize("sm", CAPABILITIES)
def test_no_kernel_spills_or_outgrows_its_device(sm, compiled):
    bad = [label(k) for k in compiled[sm] if k["spilled"]]
    assert not bad, f"spills: {bad}"
    bad = [label(k) for k in compiled[sm] if k["shared"] > SHARED[sm]]
    assert not bad, f"shared memory: {bad}"
    bad = [label(k) for k in compiled[sm] if k["registers"] * k["warps"] * 32 > 65_536]
    assert not bad, f"registers: {bad}"


@pytest.mark.parametrize("sm", CAPABILITIES)
def test_two_pooling_programs_fit_an_sm(sm, compiled):
    """128 registers a thread: one token is read while another is reduced."""
    for kernel in of(compiled[sm], "_pool_kernel"):
        assert kernel["registers"] <= 128, label(kernel)


@pytest.mark.parametrize("sm", CAPABILITIES)
def test_pooling_moves_16_bytes_at_a_time(sm, compiled):
    """A 2x2 bin of 5120 bfloat16 is 4 x 640 loads of 16 bytes, 3 of 4 x 256 threads with the last masked."""
    for kernel in of(compiled[sm], "_pool_kernel"):
        assert kernel["counts"]["narrow_loads"] == 0, label(kernel)
        assert kernel["counts"]["wide_loads"] >= 9, label(kernel)
        assert kernel["counts"]["wide_stores"] >= 2, label(kernel)
    (exact,) = of(compiled[sm], "_pool_kernel", case="pool 2x2 float16")
    assert exact["counts"]["wide_loads"] == 12


@pytest.mark.parametrize("sm", CAPABILITIES)
def test_products_run_on_tensor_cores(sm, compiled):
    for kernel in of(compiled[sm], *PRODUCTS, case="linear"):
        assert kernel["counts"][TENSOR_CORES[sm]] > 0, label(kernel)
        assert kernel["counts"]["async_copies"] > 0, label(kernel)


@pytest.mark.parametrize("sm", CAPABILITIES)
def test_distances_do_not_run_on_tensor_cores(sm, compiled):
    """TF32 is wrong by up to 2.8 times for close pairs."""
    for kernel in of(compiled[sm], "_tiles_kernel", "_sums_kernel", "_gradient_kernel", case="contrastive"):
        assert not any(kernel["counts"][name] for name in TENSOR_CORES.values()), label(kernel)
