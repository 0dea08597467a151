"""The command line of ipl.py: `main` finds out which command it is, and for what settings."""

import re
import sys
import unicodedata

import tyro

import ipl
from cli import (
    adapt,
    convert,
    edit,
    few_shot,
    inspect,
    invert,
    listing,
    messages,
    metrics,
    processes,
    report,
    run_folder,
    sample,
    settings,
    video,
)  # fmt: skip


def main(argv=None):
    """argv: words, else those of the process. Exits with 2 for bad input, in one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    processes.fit_threads()
    with messages.lenient_streams(), ipl.plain_torch():
        with messages.plain_words(speaks=processes.is_first()), processes.ends_cleanly():
            runs = command(argv)
        processes.make_all(runs, adapt.adapt)


def command(argv):
    """Does what is asked for -> the runs that are left to make."""
    check_words(argv)
    if argv and not argv[0].startswith("-"):
        known = (
            sample.sample, few_shot.command(argv), invert.invert, edit.edit, video.video,
            report.report, metrics.metrics, listing.list, convert.convert, inspect.inspect,
        )  # fmt: skip
        commands = {function.__name__.replace("_", "-"): function for function in known}
        tyro.extras.subcommand_cli_from_dict(commands, prog="ipl.py", args=argv)
        return []
    runs = run_folder.spread(settings.parse(argv, describe=processes.is_first()))
    for run in runs[1:]:  # none begins where a later one is refused
        adapt.prepare(run)
    return runs


def check_words(argv):
    """Raises ValueError for words that are no text, and for empty ones, such as a shell makes of a
    variable that is not set: an empty path would be this folder, or the default."""
    for before, word in zip(["", *argv], argv, strict=False):
        flag = before if before.startswith("-") else "a value"
        if any(unicodedata.category(x) in ("Cc", "Cs") for x in word):
            raise ValueError(f"{flag} is {word!r}; wanted: UTF-8 without control characters")
        if not word or re.fullmatch("--[^=]+=", word):
            flag = word[:-1] or flag
            if flag not in ("--freeze", "--ctx-init", "--ctx_init"):  # which may be none
                raise ValueError(f"{flag} is empty; wanted: none at all, or more")
