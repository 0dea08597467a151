"""The notebooks as they are committed. What they compute, pytest --nbval runs and compares."""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from PIL import Image

import ipl
from notebooks import address as address_of
from notebooks import plots

FOLDER = Path(__file__).parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
SKIP, IGNORE = "nbval-skip", "nbval-ignore-output"


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def tags(cell):
    return cell.metadata.get("tags", [])


def codes(notebook):
    """The code cells that are run; those tagged to be skipped need a download."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if SKIP not in tags(cell)]


def test_are_numbered_from_one_without_gaps_and_named_in_the_index():
    assert [path.name[:3] for path in PATHS] == [f"{i:02}_" for i in range(1, len(PATHS) + 1)]
    index = (FOLDER / "README.md").read_text()
    assert re.findall(r"\]\((\d\d_\w+\.ipynb)\)", index) == [path.name for path in PATHS]


def test_has_a_clean_form(path, notebook):
    nbformat.validate(notebook)
    text = path.read_text()
    assert path.stat().st_size <= 400_000
    # as nbconvert writes it, which else would touch every line
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"tags"} and set(tags(cell)) <= {SKIP, IGNORE}


def test_was_run_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in codes(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in notebook.cells:
        if SKIP in tags(cell):
            assert cell.execution_count is None and not cell.outputs


def test_shows_pictures_and_text_and_nothing_of_the_machine(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    kinds = set().union(*data)
    assert kinds - {"text/plain"} and kinds <= {"image/png", "image/jpeg", "text/plain"}
    for output, shown in zip(outputs, data, strict=True):
        # no error or warning; no value at the end of a cell
        assert output.output_type in ("stream", "display_data") and not output.get("metadata")
        assert output.get("name") != "stderr"
        text = output.get("text", "") + shown.get("text/plain", "")  # no address, path or time
        assert not re.search(r"\b0x[0-9a-f]{6,}|(^|[\s'\"=(])/\w+/|\bcuda:\d|\d\d:\d\d:\d\d", text)


def test_begins_with_title_and_setup_and_leads_on(path, notebook):
    title, place, setup = notebook.cells[:3]
    number, last = PATHS.index(path), notebook.cells[-1]
    head, badge, idea, seen, *_ = title.source.split("\n\n")
    assert head.startswith(f"# {number + 1} · ") and idea.startswith("**One idea.** ")
    # its time is that of the index
    (seconds,) = re.findall(r"^\*\*What you will see\*\* \((\d+) s\): ", seen)
    index = (FOLDER / "README.md").read_text()
    assert re.search(rf"\]\({path.name}\).* \| {seconds} \|$", index, re.MULTILINE)
    (address,) = re.findall('^REPOSITORY = "(.*?)"', place.source, re.MULTILINE)
    assert badge.startswith("[![Open in Colab](")
    assert badge.endswith(f"]({address_of.badge(address, path.name)})")
    assert place.source == nbformat.read(PATHS[0], as_version=4).cells[1].source
    assert "rng = torch.Generator().manual_seed(0)" in setup.source.splitlines()[-2:]
    name = PATHS[number + 1].name if number + 1 < len(PATHS) else "../README.md"
    assert last.cell_type == "markdown" and f"({name})" in last.source.strip().splitlines()[-1]
    assert "## Conclusion" in last.source
    texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    local = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", texts)
    assert local and all((FOLDER / link.partition("#")[0]).exists() for link in local), local


def test_first_cell_clones_where_nothing_is(tmp_path):
    """The first cells of all notebooks, in a folder with nothing around it."""
    setups = [cell for path in PATHS for cell in nbformat.read(path, as_version=4).cells[1:3]]
    script = "\n".join(cell.source for cell in setups) + "\nprint(root)"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(folder, repository):
        code = re.sub('REPOSITORY = ".*?"', f"REPOSITORY = {repository!r}", script)
        command = [sys.executable, "-W", "ignore", "-c", code]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)

    found = run(tmp_path, "")
    assert "FileNotFoundError" in found.stderr and "REPOSITORY" in found.stderr
    for folder in (tmp_path, tmp_path / "ipl" / "docs"):  # once, and found again
        found = run(folder, str(FOLDER.parent))
        assert found.stdout.strip() == str(tmp_path / "ipl"), found.stderr


def test_one_command_gives_all_an_address_and_takes_it_back(tmp_path):
    for path in [*PATHS, FOLDER / "address.py"]:
        shutil.copy(path, tmp_path)

    def call(address):
        command = [sys.executable, tmp_path / "address.py", address]
        return subprocess.run(command, capture_output=True, text=True)

    assert call("https://example.com/me/ipl").stderr.startswith("wanted: ")
    assert call("https://github.com/me/ipl").returncode == 0
    for path in PATHS:
        cells = nbformat.read(tmp_path / path.name, as_version=4).cells
        assert 'REPOSITORY = "https://github.com/me/ipl"' in cells[1].source
        link = f"https://colab.research.google.com/github/me/ipl/blob/main/notebooks/{path.name}"
        assert f"]({link})\n" in cells[0].source
    assert call("").returncode == 0
    assert all("](README.md#colab)" in (tmp_path / path.name).read_text() for path in PATHS)


def test_sliders_show_what_they_are_set_to_and_nothing_without_ipywidgets(monkeypatch):
    pytest.importorskip("ipywidgets")
    shown = []
    monkeypatch.setattr(plots, "display", shown.append)
    images = {(x, y): torch.full((2, 3, 8, 8), float(x) * y) for x in ("-1", "1") for y in (0, 1)}
    plots.sliders(images, target=["-1", "1"], blend=[0, 1])
    first, second, image = shown.pop().children
    for target, blend, grey in (("1", 1, 255), ("-1", 1, 0), ("-1", 0, 127)):
        first.value, second.value = target, blend
        picture = Image.open(io.BytesIO(image.value))
        assert picture.size == (512, 256) and picture.getpixel((300, 9)) == (grey, grey, grey)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    plots.sliders(images, target=["-1", "1"], blend=[0, 1])
    assert not shown


def exercise(notebook):
    """What "Change one number" asks to change, and the code cells after that."""
    (cell,) = (cell for cell in notebook.cells if "## Change one number" in cell.source)
    old, new = re.search(r"## Change one number\n\nChange `(.+?)` to `(.+?)`", cell.source).groups()
    code = "\n\n".join(cell.source for cell in codes(notebook))
    assert code.count(old) == 1, old
    return code.replace(old, new)


def test_asserts_what_it_says_and_copies_no_function_of_ipl(notebook):
    ast.parse(exercise(notebook))  # it can be done
    nodes = [x for cell in codes(notebook) for x in ast.walk(ast.parse(cell.source))]
    assert sum(isinstance(x, ast.Assert) for x in nodes) >= 3
    defined = {x.name for x in nodes if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    assert not defined & vars(ipl).keys()


@pytest.mark.slow
def test_holds_what_it_asserts_after_its_exercise(notebook, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with warnings.catch_warnings(action="ignore"):  # such as that ema=0.99 needs more steps
        exec(compile(exercise(notebook), "notebook", "exec"), {})
