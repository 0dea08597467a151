"""Every row of bad_input.py: one line, exit code 2, no file. docs/bad-input.md is that table."""

import atexit
import contextlib
import functools
import re
import shutil
import sys
import tempfile
import typing
from pathlib import Path

import pytest

import ipl
from tests import bad_input
from tests.bad_input import TABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the table is of Linux's answers")
ROWS = [(section, i) for section, rows in TABLE.items() for i in range(len(rows))]
PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"


@functools.cache
def here():
    """The folder of all rows: a run knows its files by their full paths."""
    folder = Path(tempfile.mkdtemp()).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "here"


@functools.cache
def answer(section, i):
    return bad_input.answer(TABLE[section][i], here())


@pytest.mark.parametrize("section, i", ROWS, ids=lambda x: x.split()[0] if x in TABLE else None)
def test_one_line_and_no_file(section, i):
    row, found = TABLE[section][i], answer(section, i)
    assert found.code == 2, found.err
    assert found.err.startswith("ipl.py: error: ") and found.err.count("\n") == 1
    assert found.err.endswith("\n") and found.err[:-1].isprintable() and len(found.err) < 600
    assert row.words in found.err
    assert found.out == ""
    if "while the results" in row.what:  # those that are whole stay
        assert found.after | found.before == found.after
        assert not any("/." in path for path in found.after)
    else:
        assert found.after == found.before


@pytest.mark.parametrize("name", ["stopped", "trained"])
def test_a_run_that_met_a_full_disk_resumes(name):
    """To the files of a run that met none."""
    section = "Folders"
    (i,) = (i for i, row in enumerate(TABLE[section]) if re.match(f"ulimit.*{name}", row.command))
    found = answer(section, i)
    assert f"{name}/checkpoint.pt" in found.after
    shutil.rmtree(here())
    here().mkdir()
    with contextlib.chdir(here()):
        bad_input.write(found.after)
        bad_input.train(name, "--resume")
        bad_input.train("whole")
        resumed, whole = (bad_input.snapshot(Path(x)) for x in (name, "whole"))
    assert resumed.pop("config.json") and whole.pop("config.json")  # of another --out
    assert resumed == whole


def test_the_page_is_the_table():
    lines = {(x, i): bad_input.line_of(TABLE[x][i], answer(x, i).err, here()) for x, i in ROWS}
    # what kind of error a library raises for a damaged file is a matter of its version, and so is
    # what tyro says
    now, written = (
        re.sub(r"\((\w+Error|BadZipFile)\b|(?<= \| )[^\n]*; see ipl.py[a-z ]* --help", "(", page)
        for page in (bad_input.page(lines), PAGE.read_text())
    )
    assert now == written, "wanted: python -m tests.bad_input > docs/bad-input.md"


def test_every_field_has_rows():
    fields = typing.get_type_hints(ipl.Config)
    commands = [row.command.split(" ", 2)[1:] for row in TABLE["Settings"]]
    for name, kind in fields.items():
        values = [
            command[1:] for command in commands if command[0] == f"--{name}".replace("_", "-")
        ]
        assert values
        assert kind is bool or typing.get_origin(kind) is tuple or [] in values
        if kind in (int, float):
            assert ["1.5" if kind is int else "nan"] in values and len(values) > 4
    assert bad_input.OUT_OF_RANGE.keys() <= fields.keys()


def test_what_is_right_is_not_refused():
    found = bad_input.answer(bad_input.Row("nothing", "ipl.py $RUN --out run", ""), here())
    assert found.code == 0 and found.out and found.after != found.before
