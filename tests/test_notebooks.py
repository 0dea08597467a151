"""The notebooks as they are committed. What they compute, pytest --nbval runs and compares."""

import ast
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

import ipl

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


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def shown_text(output):
    data = output.get("data", {}).values()
    return "\n".join([output.get("text", ""), *(x for x in data if "\n" in x or len(x) < 1000)])


def trees(notebook):
    return [ast.parse(cell.source) for cell in codes(notebook)]


def links(notebook):
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return re.findall(r"\]\(([^)\s]+)\)", "\n".join(texts))


def test_are_numbered_from_one_without_gaps():
    assert [path.name[:3] for path in PATHS] == [f"{i:02}_" for i in range(1, len(PATHS) + 1)]
    assert PATHS


def test_is_valid(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)


def test_was_run_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in codes(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_has_no_output_where_nothing_was_run(notebook):
    for cell in notebook.cells:
        if SKIP in tags(cell):
            assert cell.execution_count is None and not cell.outputs


def test_shows_pictures_as_png_alone(notebook):
    kinds = [output.data.keys() for output in outputs(notebook) if "data" in output]
    assert any("image/png" in kind for kind in kinds)
    assert set().union(*kinds) <= {"image/png", "text/plain"}


def test_ends_cells_with_pictures_by_showing_them(notebook):
    for output in outputs(notebook):  # a value at the end of a cell would show itself
        assert output.output_type in ("stream", "display_data")


def test_has_no_warning_or_error(notebook):
    for output in outputs(notebook):
        assert output.output_type != "error" and output.get("name") != "stderr"


def test_shows_nothing_of_the_machine(notebook):
    for output in outputs(notebook):
        text = shown_text(output)
        assert not re.search(r"\b0x[0-9a-f]{6,}", text)  # an address
        assert not re.search(r"(^|[\s'\"=(])/\w+/", text), text  # an absolute path
        assert not re.search(r"\bcuda:\d|\d\d:\d\d:\d\d", text), text


def test_has_clean_metadata(notebook):
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    assert {**kernel, **notebook.metadata.kernelspec} == kernel
    assert notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"tags"}
        assert set(tags(cell)) <= {SKIP, IGNORE}
        assert not any(output.get("metadata") for output in cell.get("outputs", []))


def test_begins_with_title_and_setup(path, notebook):
    title, place, setup = notebook.cells[:3]
    assert title.source.startswith(f"# {int(path.name[:2])} · ")
    assert place.source == nbformat.read(PATHS[0], as_version=4).cells[1].source
    lines = setup.source.splitlines()
    assert {"import ipl", "import miniature"} & {*lines} and "import plots" in lines
    assert "rng = torch.Generator().manual_seed(0)" in lines[-2:]


def run_setups(folder, repository=""):
    """The first cells of all notebooks, as in a folder with nothing around it -> the process."""
    setups = [cell for path in PATHS for cell in nbformat.read(path, as_version=4).cells[1:3]]
    script = "\n".join(cell.source for cell in setups) + "\nprint(root)"
    script = script.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=folder, capture_output=True,
        text=True, env={**env, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )  # fmt: skip


def test_first_cell_clones_where_nothing_is(tmp_path):
    found = run_setups(tmp_path)
    assert "FileNotFoundError" in found.stderr and "REPOSITORY" in found.stderr
    for folder in (tmp_path, tmp_path, tmp_path / "ipl" / "docs"):  # once, and found again
        found = run_setups(folder, str(FOLDER.parent))
        assert found.stdout.strip() == str(tmp_path / "ipl"), found.stderr


def exercise(notebook):
    """What "Change one number" asks to change, and the code cells after that."""
    (cell,) = (cell for cell in notebook.cells if "## Change one number" in cell.source)
    old, new = re.search(r"## Change one number\n\nChange `(.+?)` to `(.+?)`", cell.source).groups()
    code = "\n\n".join(cell.source for cell in codes(notebook))
    assert code.count(old) == 1, old
    return code.replace(old, new)


def test_has_an_exercise_that_can_be_done(notebook):
    ast.parse(exercise(notebook))


@pytest.mark.slow
def test_holds_what_it_asserts_after_its_exercise(notebook, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with warnings.catch_warnings(action="ignore"):  # such as that ema=0.99 needs more steps
        exec(compile(exercise(notebook), "notebook", "exec"), {})


def test_asserts_what_it_says(notebook):
    asserts = [x for tree in trees(notebook) for x in ast.walk(tree) if isinstance(x, ast.Assert)]
    assert len(asserts) >= 3


def test_copies_no_function_of_ipl(notebook):
    kinds = ast.FunctionDef | ast.ClassDef
    defined = {x.name for tree in trees(notebook) for x in ast.walk(tree) if isinstance(x, kinds)}
    assert not defined & vars(ipl).keys()


def test_leads_on(path, notebook):
    last = notebook.cells[-1]
    number = PATHS.index(path)
    name = PATHS[number + 1].name if number + 1 < len(PATHS) else "../README.md"
    assert last.cell_type == "markdown" and f"({name})" in last.source.strip().splitlines()[-1]
    assert "## Conclusion" in last.source
    assert any("## Change one number" in cell.source for cell in notebook.cells[-4:])


def test_links_to_what_is_there(notebook):
    local = [link for link in links(notebook) if not re.match(r"https?://|#", link)]
    assert local
    for link in local:
        assert (FOLDER / link.partition("#")[0]).exists(), link


def test_is_small(path):
    assert path.stat().st_size <= 400_000


def test_index_names_every_notebook():
    index = (FOLDER / "README.md").read_text()
    assert re.findall(r"\]\((\d\d_\w+\.ipynb)\)", index) == [path.name for path in PATHS]


def test_is_in_the_form_that_tools_write(path):
    # Else the next run of nbconvert would touch every line.
    text = path.read_text()
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
