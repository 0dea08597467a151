"""The command line of ipl.py: `main` finds out which command it is, and for what settings."""

import sys
import unicodedata

import ipl
from cli import processes, run_folder, settings
from cli.adapt import adapt, prepare
from cli.convert import convert
from cli.inspect import inspect
from cli.sample import sample


def main(argv=None):
    """argv: words, else those of the process. Exits with 2 for bad input, in one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    processes.open_streams()
    first = processes.is_first()
    with processes.plain_words(speaks=first), ipl.plain_torch():
        check_words(argv)
        if argv and not argv[0].startswith("-"):
            import tyro

            commands = {"sample": sample, "convert": convert, "inspect": inspect}
            return tyro.extras.subcommand_cli_from_dict(commands, prog="ipl.py", args=argv)
        runs = run_folder.spread(settings.parse(argv, describe=first))
        for run in runs[1:]:  # none begins where a later one is refused
            prepare(run)
    processes.make_all(runs, adapt)


def check_words(argv):
    """Raises ValueError for words that are no text."""
    for before, word in zip(["", *argv], argv, strict=False):
        if any(unicodedata.category(x) in ("Cc", "Cs") for x in word):
            flag = before if before.startswith("-") else "a word"
            raise ValueError(f"{flag} is {word!r}; wanted: UTF-8 without control characters")
