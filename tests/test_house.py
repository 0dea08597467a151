"""The three rules of the house, and its weight."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; a room may import itself and those before it.
ROOMS = "stylegan2_ops diffusion checkpoints miniature ipl variants cli experiments".split()
EXPERIMENTS = [  # on the world, above the method
    *(f"miniature/evaluate{name}.py" for name in ("", "_diffusion", "_few_shot")),
    "miniature/inspect.py",
]
ABOVE = ["benchmarks", "examples", "notebooks", "tests"]


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
    if room in ("ipl", "experiments"):
        return [ROOT / x for x in (EXPERIMENTS if room == "experiments" else ["ipl.py"])]
    return sorted({*(ROOT / room).rglob("*.py")} - {ROOT / x for x in EXPERIMENTS})


def room_of(name):
    experiment = name.startswith(("miniature.evaluate", "miniature.inspect"))
    return "experiments" if experiment else name.split(".")[0]


def test_ipl_imports_nothing_of_ours_and_stays_short():
    """But for its last lines, which start the command line."""
    text = (ROOT / "ipl.py").read_text()
    assert len(text.splitlines()) <= 800
    last = ast.unparse(ast.parse(text).body[-1])
    assert last.startswith("if __name__ == '__main__':") and "from cli import main" in last
    names = [*imports(ROOT / "ipl.py")]
    assert [x for x in names if room_of(x) in ROOMS + ABOVE] == ["cli.main"]
    assert {"torch", "numpy", "clip"} < {*names}


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "ipl"])
def test_no_arrow_runs_up_and_none_in_a_circle(room):
    above = ROOMS[ROOMS.index(room) + 1 :] + ABOVE
    known = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files(room)}
    known = {name.removesuffix(".__init__"): path for name, path in known.items()}
    arrows = {}
    for name, path in known.items():
        found = {*imports(path)}
        if name == "stylegan2_ops":  # whose load_generator goes on working
            found.discard("checkpoints")
        if name == "variants.air":  # whose last lines, like ipl.py's, start its command line
            found -= {"cli.air", "cli.air.main"}
        assert not [x for x in found if room_of(x) in above], name
        found |= {x.rpartition(".")[0] for x in found}
        arrows[name] = found & known.keys() - {name, room}
    while leaves := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows, f"a circle: {arrows}"


def test_diffusion_stays_short():
    assert sum(len(path.read_text().splitlines()) for path in files("diffusion")) <= 500


def test_weight():
    command = ["git", "ls-files", "-z"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    sizes = {name: (ROOT / name).stat().st_size for name in tracked if (ROOT / name).is_file()}
    if not sizes:
        pytest.skip("no git repository: there is no list of tracked files")
    for name, size in sizes.items():
        limit = 200 << 10 if name.startswith("docs/") and name.endswith(".png") else 5 << 20
        assert size <= limit, name
    for names, limit in (("photo.pt clip.pt judge.pt", 16), ("ddpm", 4), ("discriminator.pt", 4)):
        starts = tuple(f"miniature/weights/{name}" for name in names.split())
        assert sum(size for name, size in sizes.items() if name.startswith(starts)) <= limit << 20
    assert sum(x for name, x in sizes.items() if name.startswith("miniature/weights")) <= 20 << 20
