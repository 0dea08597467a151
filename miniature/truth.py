"""The truth, which only this world has: the person of each latent can be drawn in any domain.

`Truth(...).figures` is what the judge sees in pictures that should show given persons in a domain:

  target, source  share of the pictures in which that domain has the largest share
  none            share of the pictures that the judge calls none of the domains
  soft            mean share of the target domain
  cues            share of the six cues that are the target's; "cue eyes" ...: of each of them
  attributes      share of the person's ten attributes that are read right
  identity        share of the pictures whose nearest true photo, of n, is that of the same person
  diversity       mean distance of two pictures' features, over that of true targets
  frechet         Frechet distance of features to n true targets of other persons
  inception       exp of the mutual information of picture and attribute, mean over attributes
                  (the inception score with the judge's attribute heads)
  constant        |mean change|^2 / mean |change|^2 of the pictures' changes from their sources: 1
                  is one stamp on everybody
  structure       2 <a, b> / (<a, a> + <b, b>) of the gradient magnitudes of source and adapted
                  picture (the structural consistency score with gradients for edges)
  forms           of a fairy tale alone: share of the persons drawn in their own form, that whose
                  mean true features are nearest, mean over the forms; "form elf" ...: of each form
"""

import functools

import torch
import torch.nn.functional as F

from miniature import captions, faces
from miniature.judge import NONE
from miniature.train import pool


def true_pairs(source, target, n=64, seed=0):
    """Latents z [n, W_DIM], and true pictures [n, 3, SIZE, SIZE] of their persons in two domains.

    None if a label is not the name of a domain: "photo with anime eyes" has no one truth.
    """
    source, target = captions.plain_label(source), captions.plain_label(target)
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


def as_pixels(images):
    """Pictures in [-1, 1] as uint8, on the CPU."""
    return ((images + 1) * 127.5).round().to("cpu", torch.uint8)


class Truth:
    """n latents, the persons they stand for, and their true pictures.

        truth = Truth(128, 0, load_judge(), generator)
        truth.figures(truth.pictures(adapted), "anime")["identity"]

    z [n, z_dim] from a seed, w [n, w_dim] and generated, what the source generator draws of them
    [n, 3, R, R], are on the generator's device, where the judge has to be too; persons, others, of
    the same number, and true pictures on the CPU. A true picture takes 20 ms: it is drawn when it
    is first asked for, or by all processors in `draw_all`. Whoever has what `summary` gives can set
    `identities` and `known`, and nothing is drawn.
    """

    @torch.no_grad()
    def __init__(self, n, seed, judge, generator, source="photo"):
        rng = torch.Generator().manual_seed(seed)
        z = torch.randn(n, generator.z_dim, generator=rng)
        self.judge, self.persons, self.source = judge, faces.persons_from_z(z), source
        self.others, self.seed = faces.sample_persons(n, rng), seed
        self.z = z.to(generator.w_avg.device)
        self.w = generator.mapping(self.z)
        self.generated = self.pictures(generator)
        self.known = {}  # target -> the judge's features of the truth, and of other persons there
        self.drawn = {}  # domain -> true pictures of the persons

    def draw(self, domain, persons=None):
        """True pictures [n, 3, SIZE, SIZE] of the persons, with the same noise in all domains."""
        if persons is None and domain in self.drawn:
            return self.drawn[domain]
        n = len(self.persons)
        styles, noise = faces.styles_of(domain, n), pool.chance(n, self.seed)
        pictures = faces.render(persons or self.persons, styles, noise=noise)
        return pictures if persons else self.drawn.setdefault(domain, pictures)

    def draw_all(self, domain, bank):
        """The truth of a domain, by all processors -> uint8, first that of a bank of other persons.

        It is [len(bank) + n, 3, SIZE, SIZE]. What is asked of this domain afterwards is there.
        """
        n, crowd = len(self.persons), (bank, self.persons, self.others)
        crowd = faces.Persons(*(torch.cat([getattr(p, k) for p in crowd]) for k in vars(bank)))
        styles = faces.styles_of(domain, len(crowd))
        pixels = pool.draw(crowd, styles, self.seed, desc=f"true {domain}")
        self.drawn[domain], others = (pool.as_images(x) for x in pixels[len(bank) :].split(n))
        self.known[domain] = [self.read(x)["features"] for x in (self.drawn[domain], others)]
        return pixels[:-n]

    def summary(self, target):
        """Tensors and numbers: all that is asked of the truth of a target, and its own figures."""
        true = self.draw(target)
        return {
            "features": self.features(target),
            "identities": self.identities,
            "photo": as_pixels(self.generated[:5]),
            "truth": as_pixels(true[:5]),
            "rows": {
                "source": self.figures(self.generated, target),
                "truth": self.figures(true, target, self.photos),
            },
        }

    @functools.cached_property
    def photos(self):
        """True pictures [n, 3, SIZE, SIZE] in the source domain."""
        return self.draw(self.source)

    @functools.cached_property
    def identities(self):
        """Who is in the photos: unit vectors [n, d], on the CPU."""
        return self.judge.identity(self.photos.to(self.z.device)).cpu()

    @torch.no_grad()
    def pictures(self, generator, w=None):
        """What a generator draws from the latents, or of codes w [n, W, w_dim] instead."""
        w = self.w if w is None else w
        return torch.cat([generator.synthesis(x) for x in w.split(32)]).clamp(-1, 1)

    @torch.no_grad()
    def read(self, images):
        """What the judge sees: its outputs, on the CPU."""
        return {name: x.cpu() for name, x in self.judge(images.to(self.z.device)).items()}

    def features(self, target):
        """The judge's features [n, d] of the true targets, and of other persons' true targets."""
        if target not in self.known:
            pictures = self.draw(target), self.draw(target, self.others)
            self.known[target] = [self.read(x)["features"] for x in pictures]
        return self.known[target]

    @torch.no_grad()
    def figures(self, images, target, before=None):
        """What the judge sees in pictures that should show these persons in a target domain.

        before: the pictures that they were made of, if not those of the source generator.
        """
        images = images.to(self.z.device)
        before = self.generated if before is None else before.to(images)
        out, (true, others) = self.read(images), self.features(target)
        source, goal = faces.DOMAINS.index(self.source), faces.DOMAINS.index(target)
        domain = out["domain"].argmax(1)
        read = [out[k].argmax(1) == self.persons.category(k) for k in faces.CATEGORIES]
        nearest = (self.judge.identity(images).cpu() @ self.identities.T).argmax(1)
        change = images - before
        constant = change.mean(0).square().sum() / change.square().sum((1, 2, 3)).mean()
        a, b = gradients(before), gradients(images)
        dice = 2 * (a * b).sum(1) / (a.square().sum(1) + b.square().sum(1))
        cues = {c: (out[f"cue {c}"].argmax(1) == goal).float().mean().item() for c in faces.CUES}
        found = {
            "target": (domain == goal).float().mean().item(),
            "source": (domain == source).float().mean().item(),
            "none": (domain == NONE).float().mean().item(),
            "soft": out["domain"].softmax(1)[:, goal].mean().item(),
            "cues": sum(cues.values()) / len(cues),
            "attributes": torch.stack(read).float().mean().item(),
            "identity": (nearest == torch.arange(len(images))).float().mean().item(),
            "diversity": (F.pdist(out["features"]).mean() / F.pdist(true).mean()).item(),
            "frechet": frechet(out["features"], others),
            "inception": sum(inception(out[k]) for k in faces.CATEGORIES) / len(faces.CATEGORIES),
            "constant": constant.nan_to_num().item(),  # 0 / 0: nothing has changed
            "structure": dice.mean().item(),
            **{f"cue {c}": share for c, share in cues.items()},
        }
        if target == "fairy tale":
            shares = self.forms(out["features"], others)
            found |= {"forms": sum(shares.values()) / len(shares)}
            found |= {f"form {name}": share for name, share in shares.items()}
        return found

    def forms(self, features, others):
        """{form: share of its persons whose features [n, d] are nearest to its mean in others'}."""
        own, known = faces.forms_of(self.persons), faces.forms_of(self.others)
        means = [others[known == k].mean(0) for k in range(len(faces.FORMS))]
        similar = F.normalize(features, dim=1) @ F.normalize(torch.stack(means), dim=1).T
        right = (similar.nan_to_num(-1).argmax(1) == own).float()
        there = [(name, own == k) for k, name in enumerate(faces.FORMS) if (own == k).any()]
        return {name: right[of_it].mean().item() for name, of_it in there}
