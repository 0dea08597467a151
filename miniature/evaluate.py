"""What the judge sees in a run: ``python -m miniature.evaluate --run runs/photo-to-anime``.

The judge shares nothing with the CLIP that trained the run, and the miniature knows the truth: the
person of each latent can really be drawn in both domains. All figures are shares of `n` pictures,
drawn without truncation from one seed that no training uses.

  source, target  the judge finds that domain to have the largest share in the picture
  attributes      of the person's ten attributes, those that the judge reads right
  identity        the nearest of the n true portraits in the source domain is that of the person
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from miniature import GENERATOR, faces
from miniature.judge import load_judge
from stylegan2_ops import load_generator


@dataclass(frozen=True)
class Config:
    run: Path = Path("runs/photo-to-anime")  # A finished run on the miniature world.
    n: int = 512  # Pictures.
    seed: int = 50_000  # Of the latents.


@torch.no_grad()
def figures(judge, images, persons, identities, domains):
    """One row of the table, {name: share}.

    images [n, 3, 64, 64] should show these n persons; identities [n, d]: who they are, from
    judge.identity of their true portraits; domains: the two whose shares are wanted.
    """
    out = judge(images)
    domain = out["domain"].argmax(1)
    right = [(out[k].argmax(1) == persons.category(k)).float() for k in faces.CATEGORIES]
    nearest = (judge.identity(images) @ identities.T).argmax(1)
    shares = {d: (domain == faces.DOMAINS.index(d)).float().mean() for d in domains}
    shares["attributes"] = torch.stack(right).mean()
    shares["identity"] = (nearest == torch.arange(len(images))).float().mean()
    return {k: x.item() for k, x in shares.items()}


@torch.no_grad()
def main(cfg):
    """Print the table: the source generator's pictures, the adapted one's, and the truth."""
    settings = json.loads((cfg.run / "config.json").read_text())
    domains = settings["source"], settings["target"]
    source, adapted = load_generator(GENERATOR), load_generator(cfg.run / "generator.pt")
    judge = load_judge()

    z = torch.randn(cfg.n, source.z_dim, generator=torch.Generator().manual_seed(cfg.seed))
    persons, w = faces.persons_from_z(z), source.mapping(z)
    truth = [faces.render(persons, faces.styles_of(domain, cfg.n)) for domain in domains]
    identities = judge.identity(truth[0])
    rows = {
        f"{domains[0]}, generated": torch.cat([source.synthesis(part) for part in w.split(64)]),
        f"{domains[1]}, adapted": torch.cat([adapted.synthesis(part) for part in w.split(64)]),
        f"{domains[0]}, true": truth[0],
        f"{domains[1]}, true": truth[1],
    }
    print(f"{cfg.n} pictures, seed {cfg.seed}, {cfg.run}")
    for i, (name, images) in enumerate(rows.items()):
        row = figures(judge, images.clamp(-1, 1), persons, identities, domains)
        if i == 0:
            print(" ".join([" " * 22, *(f"{k:>12}" for k in row)]))
        print(" ".join([f"{name:22}", *(f"{x:12.3f}" for x in row.values())]))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
