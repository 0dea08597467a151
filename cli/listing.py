"""python ipl.py list: the targets that need no download, and the finished runs."""

from pathlib import Path

from cli.run_folder import find_generator, made_by, read_config
from cli.settings import expand
from miniature import LABELS

LOOKS = {  # of LABELS, in a word each
    "photo": "rendered", "anime": "big-eyed", "sketch": "pencilled", "pixel art": "blocky",
    "watercolor": "washed", "ukiyo-e": "woodblock", "zombie": "stitched", "elderly": "wrinkled",
    "monster": "horned", "negative": "inverted", "fairy tale": "elves",
}  # fmt: skip


def list(folder: Path = Path("runs")):
    """Print the domains of the embedded world, for --source and --target, and the finished runs.

    Args:
        folder: Where the runs are.
    """
    folder = Path(expand(folder))
    if not folder.is_dir() and folder != Path("runs"):  # which the first run makes
        raise ValueError(f"--folder {folder}: no folder; wanted: where the runs are")
    print("domains of the miniature, for --source and --target; any other words: --generator FILE")
    print(*(f"  {name:12}{LOOKS[name]}" for name in LABELS), sep="\n")
    runs = sorted(x for x in folder.glob("*") if find_generator(x))
    print(f"finished runs in {folder}: {len(runs) or 'none'}")
    for run in runs:
        try:
            cfg = read_config(run)
            method = made_by(run) or cfg.method
            what = f"{cfg.source} to {cfg.target}, {method}, seed {cfg.seed}"
        except ValueError as error:  # a run whose config is damaged does not hide the others
            what = str(error)
        print(f"  {run}  {what}")
