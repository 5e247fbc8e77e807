"""Who may import whom. A failure names the file and the line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"kernels": set(), "engine": {"kernels"}, "probes": {"kernels", "engine"}}
# what of the engine knows of probes: commands, and what the demo makes of them
BOTH = {f"engine/demo/{name}.py" for name in ("page", "probes", "questions")}
BOTH |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "engine/commands").glob("*.py")}
MODEL_LIBRARIES = {"transformers", "diffusers", "accelerate"}


def imports(path: Path, *, top_level_only: bool = False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from ((node.lineno, name) for name in names)


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, f"no files in {room}"
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    bad = []
    for path in files(room):
        allowed = set(ROOMS) if path.relative_to(ROOT).as_posix() in BOTH else ROOMS[room] | {room}
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "spatialprobe" and parts[1] not in allowed:
                bad.append(f"{path}:{line} imports {name}")
            if parts[0] in ROOMS:
                bad.append(f"{path}:{line} imports {name} from the repository's folder, not the package")
    assert not bad, "\n".join(bad)


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "spatialprobe"} | set(sys.stdlib_module_names)
    bad = [
        f"{p}:{line} {name}" for p in files("kernels") for line, name in imports(p) if name.split(".")[0] not in allowed
    ]
    assert not bad, "\n".join(bad)


def test_adapters_import_no_sibling_and_no_model_library_at_the_top():
    bad = []
    for path in files("engine/adapters"):
        bad += [f"{path}:{n} {name}" for n, name in imports(path) if name.startswith("spatialprobe.engine.adapters")]
    for room in ("engine", "probes"):
        for path in files(room):
            top = imports(path, top_level_only=True)
            bad += [f"{path}:{n} {name}" for n, name in top if name.split(".")[0] in MODEL_LIBRARIES]
    assert not bad, "\n".join(bad)


def test_probes_never_import_adapters():
    bad = [f"{p}:{n} {name}" for p in files("probes") for n, name in imports(p) if ".adapters" in name]
    assert not bad, "\n".join(bad)


def test_listing_models_loads_no_model_library():
    code = (
        "import sys; from spatialprobe.engine.cli import main; main(['models']);"
        f"print(sorted({MODEL_LIBRARIES | {'torch'}!r} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert "wan2.1-t2v-14b" in out
