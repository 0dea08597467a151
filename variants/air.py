"""AIR (arXiv 2506.10895): zero-shot adaptation that corrects its direction on the way.

Differs from ipl.py in: 1. from step `start` on, every `interval` steps, stage 2 keeps a copy of
its generator, the anchor G_A; 2. a prompt P learns to mean what the anchor draws, and from P the
way to the target is taken anew; 3. a second directional loss goes that way from the anchor's images
on. The first stays NADA's, as published, or IPL's, which AIR's authors did not release.

u(x) = x / |x|; w_i: n fixed latents; k: 79 templates; before the first anchor G_A is the source
generator, and T_A,k the source's label in each template:
 (1) delta_I = u(mean_i u(u(E_I(G_t(w_i))) - u(E_I(G_A(w_i)))))                     mean_step
 (2) T_P = u(E_T([SOS] ctx label [EOT])), label = (1 - a) source + a target         encode_between
     ctx: min 1 - cos(delta_I, u(mean_k u(T_P - T_A,k))), a = step / steps          align_prompt
 (3) delta_A = u(mean_k u(T_target,k - T_P)); then G_A := G_t, T_A := T_P           renew
 (4) L = L_stage2 + lambda_air mean[1 - cos(E_I(G_t(w)) - E_I(G_A(w)), delta_A)]    adapt

Where it departs from the published code, its train.py
 1. There P is 5 copies, which start equal, get equal gradients and stay equal. Here it is one.
 2. At an anchor (4) is 0/0 but for fresh noise; there 1e-6 is then added to an image. Here eps > 0
    smooths it, as in ipl.py, and allows fixed noise. (4) has random crops, if any, of its own.
 3. (1) is at truncation 0.7, training at 1. Kept; in the miniature both are at 1.
 4. Labels of unequal length are mixed token by token, EOT where the target's is. Kept.
 5. L_stage2's direction is u(mean_k (T_target,k - T_source,k)), ipl.py's; there, of unit steps.
 6. The result is the moving average, there the figures are of the raw generator. A start by
    zero-shot probability, off there, and a choice of 18 of 18 layers are left out.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import ipl


@dataclass(frozen=True)
class Config(ipl.Config):
    """As published for photo to sketch, with ViT-B/32 (human to baby: 201 steps, 100, 20)."""

    method: Literal["ipl", "nada"] = "nada"  # First direction: of each image, or one for all.
    steps: int = 301  # Stage 2: number of steps.
    layers: Literal["adaptive", "all"] = "all"  # Stage 2: layers trained in each step.
    start: int = 150  # Anchors: the first step that can have one.
    interval: int = 30  # Anchors: made before the steps that it divides.
    latents: int = 1000  # Anchors: fixed latents, n, whose mean step is taken.
    truncation: float = 0.7  # Anchors: of these latents.
    prompt_steps: int = 200  # Anchors: steps of Adam for the prompt.
    prompt_lr: float = 0.001  # Anchors: its rate.
    lambda_air: float = 1.0  # Weight of the second loss; with 0 it is NADA, or IPL, to the bit.


def check_config(cfg):
    """Raises ValueError, in one sentence, for settings that cannot be meant."""
    counts = cfg.start, cfg.interval, cfg.latents, cfg.prompt_steps
    if min(counts) < 1 or not (0 < cfg.prompt_lr < 1e30 and 0 <= cfg.lambda_air < 1e30):
        raise ValueError("wanted, of anchors: lambda_air from 0, prompt_lr above 0, counts from 1")
    if cfg.noise == "fixed" and cfg.eps == 0:
        raise ValueError("noise='fixed' with eps=0 divides 0 by 0 at an anchor; wanted: eps=0.1")


# -- The equations, on features of images and of texts ---------------------------------------------
def mean_step(before, after):
    """Equations (1), (3): the direction [e] in which features [N, e] or [1, e] go on average."""
    steps = F.normalize(ipl.feature_delta(before, after), dim=-1)
    return F.normalize(steps.mean(dim=0), dim=-1)


def alignment(delta, features, true_features):
    """cos of a direction [e] and the step that is left, from images to the true ones, [n, e]."""
    return F.cosine_similarity(delta, mean_step(features, true_features), dim=-1).item()


@torch.no_grad()
def label_texts(clip_model, label):
    """A label in each of the 79 templates, features [79, e]."""
    return ipl.encode_texts(clip_model, [template.format(label) for template in ipl.TEMPLATES])


def encode_between(clip_model, ctx, source, target, a):
    """T_P of equation (2), [1, e]: the mean of prompts with ctx [C, n_ctx, d]."""
    x, y = (ipl.construct_prompts(clip_model, ctx, label) for label in (source, target))
    C, L, d = y.shape
    padding = clip_model.token_embedding.weight[0].expand(C, max(0, L - x.shape[1]), d)
    x = torch.lerp(torch.cat([x, padding], dim=1)[:, :L], y, a)  # departure 4
    features = ipl.encode_embeddings(clip_model, x, torch.full((C,), L - 1, device=x.device))
    return F.normalize(F.normalize(features, dim=-1).mean(dim=0, keepdim=True), dim=-1)


def align_prompt(cfg, clip_model, ctx, delta_image, texts_before, a):
    """Equation (2), from ctx [C, n_ctx, d], delta_I [e] and T_A [K, e] -> ctx, T_P, the loss."""
    ctx = ctx.clone().requires_grad_()
    optimizer = torch.optim.Adam([ctx], lr=cfg.prompt_lr)
    for step in range(cfg.prompt_steps + 1):
        text = encode_between(clip_model, ctx, cfg.source, cfg.target, a)
        loss = 1 - mean_step(texts_before, text) @ delta_image
        if step < cfg.prompt_steps:
            optimizer.zero_grad()
            loss.backward(inputs=[ctx])
            optimizer.step()
    return ctx.detach(), text.detach(), loss.item()


# -- Anchors ---------------------------------------------------------------------------------------
class Anchor(nn.Module):
    """The last anchor: a module, so that what keeps the state of a run keeps it too."""

    def __init__(self, generator, n, texts):
        super().__init__()
        self.generator = copy.deepcopy(generator).requires_grad_(False)  # G_A
        self.register_buffer("step", torch.tensor(-1))  # when it was made; -1: not yet
        self.register_buffer("images", texts.new_zeros(n, texts.shape[1]))  # of (1), [n, e]
        self.register_buffer("texts", texts)  # T_A [79, e]
        self.register_buffer("delta", torch.zeros_like(texts[0]))  # delta_A [e]


def anchor_latents(cfg, generator):
    """The z [n, z_dim] of w_i."""
    return ipl.sample_latents(cfg.latents, generator.z_dim, 80_000).to(generator.w_avg.device)


def renew(cfg, anchor, target, clip, step, noise=None):
    """Equations (1) to (3): G_t becomes the anchor -> the loss of its prompt. noise: an rng."""
    clip_model, E_I = clip[0], ipl.image_encoder(*clip, cfg)

    @torch.no_grad()
    def features(generator):
        w = generator.mapping(anchor_latents(cfg, generator))
        w = ipl.truncate(w, generator.w_avg, cfg.truncation)
        return torch.cat([E_I(generator.synthesis(x, rng=noise)) for x in w.split(32)])

    images, a = features(target), step / cfg.steps
    before = anchor.images if anchor.step >= 0 else features(anchor.generator)
    ctx = clip_model.token_embedding(ipl.tokenize(clip_model, cfg.ctx_init)[0])[:, 1:-1].detach()
    _, text, loss = align_prompt(cfg, clip_model, ctx, mean_step(before, images), anchor.texts, a)
    anchor.delta.copy_(mean_step(text, label_texts(clip_model, cfg.target)))
    anchor.images.copy_(images), anchor.texts.copy_(text), anchor.step.fill_(step)
    anchor.generator.load_state_dict(target.state_dict())
    return loss


@ipl.plain_torch()
def adapt(cfg, generator, clip, *, rng, true_features=None, steps=ipl.progress):
    """ipl.adapt with anchors, for clip = (clip_model, transform) -> adapted, mappers, history, and
    a row for each anchor: {"step": 60, "prompt_loss": 0.1}; with true_features [n, e], of what the
    pictures of anchor_latents should become, "left", the length of their mean step to it, "cos_air"
    and "cos", `alignment` of delta_A and of the first direction. Anchor and rows are in the state
    that `steps` sees, what else is drawn for them is of the seed of rng and the step: so a run goes
    on to the same bits. rng is left alone.
    """
    check_config(cfg)
    E_I, rows, now, seed = ipl.image_encoder(*clip, cfg), [], {}, rng.initial_seed() + 1
    _, noise_of = ipl.random_inputs(cfg, generator, torch.Generator().manual_seed(seed))
    anchor = Anchor(generator, cfg.latents, label_texts(clip[0], cfg.source))

    def watch(stage, total, state):
        more = {"anchor": anchor, "anchors": rows} if stage == 2 else {}
        for step in steps(stage, total, state | more):
            now["step"] = step
            due = step >= cfg.start and step % cfg.interval == 0 and step > anchor.step
            if stage == 2 and due:
                loss = renew(cfg, anchor, state["target"], clip, step, noise_of(step))
                rows.append({"step": step, "prompt_loss": loss} | of_truth())
            yield step

    @torch.no_grad()
    def of_truth():
        if true_features is None:
            return {}
        z, left = anchor_latents(cfg, generator), ipl.feature_delta(anchor.images, true_features)
        first = F.normalize(now["direction"](generator.mapping(z), z), dim=-1).mean(dim=0)
        ways = {"cos_air": anchor.delta, "cos": first}
        found = {name: alignment(x, anchor.images, true_features) for name, x in ways.items()}
        return found | {"left": left.mean(dim=0).norm().item()}

    def redirect(directions):  # which are told the latents, and more_loss the images
        (now["direction"],) = directions
        return [lambda w, *x: now.update(w=w) or now["direction"](w, *x)]

    def more_loss(x_source, x_target):  # the second term of equation (4)
        if anchor.step < 0:
            return x_target.new_zeros(len(x_target))
        own, noise = torch.Generator().manual_seed(seed + now["step"]), noise_of(now["step"])
        windows = ipl.random_windows(cfg.batch, cfg.crop, own) if cfg.crop else None
        with torch.no_grad():
            x_anchor = anchor.generator.synthesis(now["w"], rng=noise)
            before = E_I(ipl.crop_images(x_anchor, windows))
        delta_image = ipl.feature_delta(before, E_I(ipl.crop_images(x_target, windows)))
        loss = ipl.directional_loss(delta_image, anchor.delta, cfg.eps)
        return cfg.lambda_air * loss.expand(len(x_target))

    more = {"redirect": redirect, "more_loss": more_loss}
    return *ipl.adapt(cfg, generator, [clip], rng=rng, steps=watch, **more), rows


if __name__ == "__main__":
    from cli.air import main

    main()
