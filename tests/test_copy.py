"""ipl.py alone, in a folder of its own, with torch, numpy, tqdm and clip: it imports, it adapts."""

import inspect
import shutil
import sys

import pytest
from command import GOLDEN, ROOT, finish, start
from test_host import Toy

SCRIPT = """
import socket, sys
import clip, numpy, torch, torch.optim.swa_utils, tqdm

for name in ("tyro", "matplotlib", "safetensors", "stylegan2_ops", "miniature", "cli"):
    sys.modules[name] = None  # from here on, importing it is an ImportError
socket.socket = None  # and there is no network
loaded, seed = set(sys.modules), torch.get_rng_state()
import ipl
assert ipl.__file__.startswith({folder!r}) and torch.equal(torch.get_rng_state(), seed)
new = {{name.partition(".")[0] for name in set(sys.modules) - loaded}} - sys.stdlib_module_names
assert new == {{"ipl"}}, new

{toy}
toy = Toy()
cfg = ipl.Config(batch_mapper=4, steps_mapper=3, steps=5, eps=0.1, noise="fixed", ema=0.5)
rng = torch.Generator().manual_seed(0)
adapted, mappers, history = ipl.adapt(cfg, toy, [ipl.load_clip({clip!r})], rng=rng)
assert len(mappers) == 1 and len(history) == 8 and history[-1]["delta_image_norm"] > 0
assert ipl.sample_grid(toy, adapted, n=3).shape == (2 * 16, 3 * 16, 3)
"""


@pytest.mark.slow
def test_ipl_copied_alone_adapts_a_toy_generator(tmp_path):
    shutil.copy(ROOT / "ipl.py", tmp_path)
    words = {"folder": str(tmp_path), "clip": str(GOLDEN / "clip_tiny.pt")}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(toy=inspect.getsource(Toy), **words))
    finish(start(folder=tmp_path, before=[sys.executable, "-W", "ignore"], script=script))


def test_ipl_alone_says_what_its_command_line_lacks(tmp_path):
    job = start("--target", "anime", script=shutil.copy(ROOT / "ipl.py", tmp_path))
    assert "wanted: the whole repository" in job.communicate()[1] and job.returncode == 1
