"""ipl.py alone, in a folder of its own, with torch, numpy and clip: it imports, and it adapts."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

IMPORT = """
import contextlib, io, socket, sys

import clip, numpy, torch

for name in ("tyro", "matplotlib", "safetensors", "stylegan2_ops", "miniature", "tests"):
    sys.modules[name] = None  # from here on, importing it is an ImportError


def no_network(*args, **kwargs):
    raise AssertionError("ipl.py opens a connection")


socket.socket = no_network
sys.path.insert(0, {folder!r})
loaded, seed = set(sys.modules), torch.get_rng_state()
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
    import ipl
assert ipl.__file__.startswith({folder!r}) and out.getvalue() == ""
assert torch.equal(torch.get_rng_state(), seed)
new = {{name.partition(".")[0] for name in set(sys.modules) - loaded}} - sys.stdlib_module_names
assert new == {{"ipl"}}, new
"""

ADAPT = """
class Toy(torch.nn.Module):
    z_dim, w_dim, num_ws, resolution = 8, 8, 2, 16

    def __init__(self):
        super().__init__()
        self.low, self.high = torch.nn.Linear(8, 3 * 4 * 4), torch.nn.Linear(8, 3 * 16 * 16)
        self.w_avg = torch.zeros(8)

    def mapping(self, z):
        return z

    def synthesis(self, w, *, rng=None):
        w = w if w.ndim == 3 else w[:, None].expand(-1, 2, -1)
        low = self.low(w[:, 0]).view(-1, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return (low + self.high(w[:, 1]).view(-1, 3, 16, 16)).tanh()

    def layers(self):
        return [self.low, self.high]


toy = Toy()
before = [p.clone() for p in toy.parameters()]
cfg = ipl.Config(batch_mapper=4, steps_mapper=3, steps=5, eps=0.1, noise="fixed", layer_batch=4)
rng = torch.Generator().manual_seed(0)
clip_model, transform = ipl.load_clip({clip!r})
mapper, history = ipl.train_mapper(cfg, toy, clip_model, transform, rng=rng)
directions = ipl.prompt_directions(cfg, clip_model, mapper)
adapted, rest = ipl.adapt_generator(cfg, toy, clip_model, transform, directions, rng=rng)
assert len(history) == 3 and len(rest) == 5 and rest[-1]["delta_image"] > 0
assert all(len(row["layers"]) == 1 for row in rest)
assert all(torch.equal(p, q) for p, q in zip(toy.parameters(), before))
assert any(not torch.equal(p, q) for p, q in zip(adapted.parameters(), before))
assert ipl.sample_grid(toy, adapted, n=3).shape == (2 * 128, 3 * 128, 3)
print("adapted")
"""


def test_ipl_copied_alone_adapts_a_toy_generator(tmp_path):
    shutil.copy(ROOT / "ipl.py", tmp_path)
    clip_file = str(Path(__file__).parent / "golden" / "clip_tiny.pt")
    script = IMPORT.format(folder=str(tmp_path)) + ADAPT.format(clip=clip_file)
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "adapted\n"), done.stderr
    assert done.stderr == ""
