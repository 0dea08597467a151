"""python notebooks/address.py https://github.com/OWNER/NAME: where Colab finds these notebooks.

Writes REPOSITORY into the first cell of each, and makes their badges open Colab, which until then
lead to a page that says how. "" takes both back.
"""

import re
import sys
from pathlib import Path

PATHS = sorted(Path(__file__).parent.glob("*.ipynb"))


def badge(address, name):
    """What the badge of the notebook called name leads to."""
    owner_and_name = address.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{name}"
    return colab if address else "README.md#colab"


def write(address):
    for path in PATHS:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r'(REPOSITORY = \\")[^"\\]*', rf"\g<1>{address}", text)
        text = re.sub(r"(colab-badge\.svg\)\]\()[^)]*", rf"\g<1>{badge(address, path.name)}", text)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    address = sys.argv[-1].removesuffix(".git")
    if len(sys.argv) != 2 or not re.fullmatch(r"(https://github\.com/[\w.-]+/[\w.-]+)?", address):
        sys.exit("wanted: python notebooks/address.py https://github.com/OWNER/NAME")
    write(address)
