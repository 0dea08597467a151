"""The three rules of the house, and its weight."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; a room may import itself and those before it.
ROOMS = ["stylegan2_ops", "checkpoints", "miniature", "ipl", "cli", "experiments"]
EXPERIMENTS = ["miniature/evaluate.py", "miniature/inspect.py"]  # on the world, above the method
ABOVE = ["benchmarks", "notebooks", "tests"]


def imports(path):
    """The modules that a file imports, anywhere in it, and the names taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def files(room):
    return [ROOT / f"{room}.py"] if room == "ipl" else sorted((ROOT / room).rglob("*.py"))


def room_of(name):
    if name.startswith(("miniature.evaluate", "miniature.inspect")):
        return "experiments"
    return name.split(".")[0]


def test_ipl_imports_nothing_of_ours():
    """But for its last lines, which start the command line."""
    tree = ast.parse((ROOT / "ipl.py").read_text())
    *method, last = tree.body
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    names = set()
    for node in ast.walk(ast.Module(method, [])):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    assert not names & {*ROOMS, *ABOVE}
    assert {"torch", "numpy", "clip"} < names


@pytest.mark.parametrize("room", [*ROOMS[:3], "cli", "experiments"])
def test_no_arrow_runs_up(room):
    paths = [ROOT / x for x in EXPERIMENTS] if room == "experiments" else files(room)
    above = ROOMS[ROOMS.index(room) + 1 :] + ABOVE
    for path in paths:
        if room == "miniature" and str(path.relative_to(ROOT)) in EXPERIMENTS:
            continue
        for name in imports(path):
            if path == ROOT / "stylegan2_ops" / "__init__.py" and name == "checkpoints":
                continue  # `from stylegan2_ops import load_generator` goes on working
            assert room_of(name) not in above, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", [x for x in ROOMS if x not in ("ipl", "experiments")])
def test_no_circle_within_a_room(room):
    known = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files(room)}
    known = {name.removesuffix(".__init__"): path for name, path in known.items()}
    arrows = {
        name: {
            target
            for found in imports(path)
            for target in (found, found.rpartition(".")[0])
            if target in known and target not in (name, room)
        }
        for name, path in known.items()
    }
    while leaves := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows, f"a circle: {arrows}"


def test_ipl_stays_short():
    assert len((ROOT / "ipl.py").read_text().splitlines()) <= 800


def test_weight():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")
    sizes = {name: (ROOT / name).stat().st_size for name in tracked if (ROOT / name).is_file()}
    if not sizes:
        pytest.skip("no git repository: there is no list of tracked files")
    heavy = {name: size for name, size in sizes.items() if size > 5 << 20}
    assert not heavy
    weights = sum(size for name, size in sizes.items() if name.startswith("miniature/weights"))
    assert weights <= 16 << 20
    pictures = {n: s for n, s in sizes.items() if n.startswith("docs/") and n.endswith(".png")}
    assert not {name: size for name, size in pictures.items() if size > 200 << 10}
