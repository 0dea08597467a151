"""The truth, which only this world has: the person of each latent can be drawn in any domain.

`Truth(...).figures` is what the judge sees in pictures that should show given persons in a domain:

  target, source  share of the pictures in which that domain has the largest share
  soft            mean share of the target domain
  cues            share of the six cues that are the target's; "cue eyes" ...: of each of them
  attributes      share of the person's ten attributes that are read right
  identity        share of the pictures whose nearest true photo, of n, is that of the same person
  diversity       mean distance of two pictures' features, over that of true targets
  frechet         Frechet distance of features to n true targets of other persons
  inception       exp of the mutual information of picture and attribute, mean over attributes
                  (the inception score with the judge's attribute heads)
  structure       2 <a, b> / (<a, a> + <b, b>) of the gradient magnitudes of source and adapted
                  picture (the structural consistency score with gradients for edges)
"""

import torch
import torch.nn.functional as F

from miniature import faces


def true_pairs(source, target, n=64, seed=0):
    """Latents z [n, W_DIM], and the true pictures [n, 3, 64, 64] of their persons in two domains.

    None if a label is not the name of a domain: "photo with anime eyes" has no one truth.
    """
    source, target = source.strip(), target.strip()
    if not {source, target} <= set(faces.DOMAINS):
        return None
    z = torch.randn(n, faces.W_DIM, generator=torch.Generator().manual_seed(seed))
    persons = faces.persons_from_z(z)
    return z, *(faces.render(persons, faces.styles_of(d, n)) for d in (source, target))


def frechet(x, y):
    """Frechet distance of two sets of features [n, d], each taken for a normal distribution."""
    x, y = x.double(), y.double()
    a, b = x.T.cov(), y.T.cov()
    cross = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross).item()


def inception(logits):
    """exp(mean KL(p(y|x) || p(y))) of logits [n, classes]."""
    log_p = logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp().item()


def gradients(images):
    """Gradient magnitude of the grey picture [n, (H - 1) (W - 1)]."""
    gray = images.mean(1)
    dx, dy = gray[:, :-1].diff(dim=2), gray[:, :, :-1].diff(dim=1)
    return (dx.square() + dy.square()).sqrt().flatten(1)


class Truth:
    """n latents, the persons they stand for, and their true pictures.

        truth = Truth(128, 0, load_judge(), generator)
        truth.figures(truth.pictures(adapted), "anime")["identity"]

    z [n, z_dim] from a seed, w [n, w_dim]; photos: true pictures [n, 3, 64, 64] in the source
    domain; generated: those of the source generator.
    """

    @torch.no_grad()
    def __init__(self, n, seed, judge, generator, source="photo"):
        rng = torch.Generator().manual_seed(seed)
        self.z = torch.randn(n, generator.z_dim, generator=rng)
        self.judge, self.persons, self.source = judge, faces.persons_from_z(self.z), source
        self.others = faces.sample_persons(n, rng)
        self.w = generator.mapping(self.z)
        self.photos = self.draw(source)
        self.identities = judge.identity(self.photos)
        self.generated = self.pictures(generator)
        self.known = {}  # target -> the judge's features of the truth, and of other persons there

    def draw(self, domain, persons=None):
        """True pictures of the persons (or of others) in a domain."""
        persons = persons or self.persons
        return faces.render(persons, faces.styles_of(domain, len(persons)))

    @torch.no_grad()
    def pictures(self, generator):
        """What a generator draws from the latents."""
        return torch.cat([generator.synthesis(w) for w in self.w.split(32)]).clamp(-1, 1)

    def features(self, target):
        """The judge's features [n, 256] of the true targets, and of other persons' true targets."""
        if target not in self.known:
            who = self.persons, self.others
            self.known[target] = [self.judge(self.draw(target, x))["features"] for x in who]
        return self.known[target]

    @torch.no_grad()
    def figures(self, images, target):
        """What the judge sees in pictures that should show these persons in a target domain."""
        out, (true, others) = self.judge(images), self.features(target)
        source, goal = faces.DOMAINS.index(self.source), faces.DOMAINS.index(target)
        domain = out["domain"].argmax(1)
        read = [out[k].argmax(1) == self.persons.category(k) for k in faces.CATEGORIES]
        nearest = (self.judge.identity(images) @ self.identities.T).argmax(1)
        a, b = gradients(self.generated), gradients(images)
        dice = 2 * (a * b).sum(1) / (a.square().sum(1) + b.square().sum(1))
        cues = {c: (out[f"cue {c}"].argmax(1) == goal).float().mean().item() for c in faces.CUES}
        return {
            "target": (domain == goal).float().mean().item(),
            "source": (domain == source).float().mean().item(),
            "soft": out["domain"].softmax(1)[:, goal].mean().item(),
            "cues": sum(cues.values()) / len(cues),
            "attributes": torch.stack(read).float().mean().item(),
            "identity": (nearest == torch.arange(len(images))).float().mean().item(),
            "diversity": (F.pdist(out["features"]).mean() / F.pdist(true).mean()).item(),
            "frechet": frechet(out["features"], others),
            "inception": sum(inception(out[k]) for k in faces.CATEGORIES) / len(faces.CATEGORIES),
            "structure": dice.mean().item(),
            **{f"cue {c}": share for c, share in cues.items()},
        }
