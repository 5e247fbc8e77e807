"""What benchmarks share: the machine a number was measured on, tables after the run, and `--record`."""

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "results"
TABLES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write what was measured to benchmarks/results/")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for table in config.stash[TABLES]:
        terminalreporter.write_line(f"\n{table}")


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """show(table): prints it after the run, also of a benchmark that missed its bar."""
    return request.config.stash[TABLES].append


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, dict], None]:
    """record(name, result): writes `results/<name>.json` when asked to by `--record`."""

    def write(name: str, result: dict) -> None:
        if request.config.getoption("--record"):
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine()} | result, indent=1) + "\n")

    return write


def machine() -> dict:
    """CPU model, cores this process may use, memory, and versions of what runs on them."""
    models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")]
    libraries = ("torch", "diffusers", "transformers", "safetensors", "pillow", "numpy")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
    }
