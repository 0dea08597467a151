"""Few-shot adaptation: k pictures of a domain ("shots") instead of its name; seven methods, a loop.

It differs from ipl.py in: 1. no CLIP and no direction: StyleGAN2's training goes on, whose
discriminator D learns to tell shots from images of G, and G to deceive it; 2. G learns all over;
3. what each method adds to that (its paper; weights as published but for ewc's):

    tgan     nothing: fine-tuning of both networks (1805.01677, as all later papers have it)
    freezed  nothing; D's first layers do not learn (FreezeD, 2002.10964)
    cr       to D's loss 10 (D(Tx) - D(x))^2 (consistency regularisation, 1910.12027)
    cdc      1000 L_distance to G's, and judges patches at 3 of 4 steps (2104.06820)
    dag      0.2 L of transformed images, to both (2006.05338)
    rssa     0.8 L_self + 0.4 L_cross to G's; patches as cdc; codes near the shots' (2203.04121)
    ewc      lambda sum F (theta - theta_source)^2 to G's (2012.02780)

Axes: B batch, k shots, R side, W = num_ws, S side of a map, C channels.

Where it departs from the published codes (CDC's, which RSSA's is made from; FreezeD's; DAG's)
 1. A batch has no shot twice while there are others. There, shuffled lists are cut into batches: of
    10 shots 8 are seen in a round, of fewer than 4 none [CDC train.py:63-66,591-596].
 2. With fewer shots than B, the spread of a batch would tell copies: `stddev_group` is 1 for all.
 3. Layers are chosen by position and receptive field. There patches are judged where 16 or 32 px
    have 512 channels [CDC model.py:757-766], and RSSA's sides are numbers: here parts of R of 256.
 4. cdc: one head of patches; of the four there one is used (highp 1). As there its logits pass a
    leaky ReLU, it never gets R1, L_distance is KL(p_source | p_target) of one layer for each anchor
    (the paper: the reverse, over all layers), and begins above 0, of unlike noise (`same_noise`).
 5. G and its average start at the same weights; CDC's G at "g", its average at "g_ema". No ADA.
 6. freezed, cr: on this base. There R1 in each step, no length of paths, the best FID kept
    (FreezeD); hinge loss, spectral norm (CR). `cr_fake` is bCR's (2002.04724).
 7. dag: R1 of the main head alone. `dag_all` off, ours, draws one transform a policy and step.
 8. rssa: the length of paths is of codes not compressed. ewc: no code is public; lambda is ours.
 9. G's mapping rests, so that w means the same to both; there it learns at 1/100 of the rate. With
    `freeze`, noise strengths rest, too: the miniature's D hardly minds grain, and lets it grow.
"""

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange

import ipl
from stylegan2_ops.discriminator import EqualConv
from stylegan2_ops.generator import Activation
from stylegan2_ops.losses import discriminator_loss, generator_loss, path_lengths, r1_penalty


# -- 0. Configuration. The comments are the --help texts -------------------------------------------
@dataclass(frozen=True)
class Config:
    # What is added to plain fine-tuning, which is tgan.
    method: Literal["tgan", "freezed", "cr", "cdc", "dag", "rssa", "ewc"] = "cdc"
    steps: int = 400  # Number of steps, of D and of G.
    batch: int = 4  # Images per step, and compared in cdc and rssa.
    lr: float = 0.001  # Learning rate, before StyleGAN2's correction for lazy regularisers.
    ema: float = 0.99  # Decay of the moving average of G, which is the result.
    freeze: str = "noise"  # Parameters of G with this in their name rest, as the mapping does.
    mixing: float = 0.0  # Probability that the codes of a batch are mixed of two.
    flip: float = 0.0  # Probability that a shot is mirrored.
    r1: float = 0.8  # Weight of R1, of D's slope at shots; 0.0002 R^2 / batch is ADA's rule.
    r1_every: int = 16  # Steps from one R1 to the next.
    path: float = 2.0  # Weight of the length of paths.
    path_every: int = 4  # Steps from one to the next.
    freeze_until: int = 16  # freezed: D's blocks rest down to so many pixels.
    cr: float = 10.0  # cr: weight of (D(Tx) - D(x))^2, of shots.
    cr_fake: float = 0.0  # cr: weight of the same of images of G.
    cr_flip: float = 0.0  # cr: probability that T mirrors.
    cr_shift: float = 1 / 32  # cr: T shifts by up to so much of the side.
    distance: float = 1000.0  # cdc: weight of L_distance.
    same_noise: bool = False  # cdc: L_distance of equal noise in both generators.
    image_every: int = 4  # cdc, rssa: D judges whole images in each n-th step, else patches.
    anchors: bool = True  # cdc, rssa: whole images are of latents near k (--no-anchors: of any).
    anchor_spread: float = 0.1  # cdc, rssa: standard deviation around them.
    dag: float = 0.2  # dag: weight of the losses of transformed images.
    # dag: which transforms.
    dag_policies: tuple[Literal["rotation", "fliprot", "cropping"], ...] = ("rotation", "cropping")
    dag_all: bool = False  # dag: all transforms of a policy in each step, else one.
    self_weight: float = 0.8  # rssa: weight of L_self, of correlations within an image.
    cross_weight: float = 0.4  # rssa: weight of L_cross, of those between images.
    cross_every: int = 6  # rssa: steps from one L_cross to the next.
    # rssa: how far codes go to the span of the shots', of layers of R, R / 2 ... pixels; then 0.
    compression: tuple[float, ...] = (0.85, 0.65, 0.45, 0.05, 0.05)
    ewc: float = 5e5  # ewc: lambda; the published 5e8 lets so small a network not move.
    ewc_draws: int = 200  # ewc: images of which F is the mean.


PUBLISHED = Config(  # of CDC, at 256 px; RSSA has 2002 steps
    steps=5002, lr=0.002, ema=0.997784, freeze="", mixing=0.9, flip=0.5, r1=10, cr_flip=0.5,
    cr_shift=1 / 8, dag_all=True, ewc=5e8)  # fmt: skip


# -- 1. What all methods share ---------------------------------------------------------------------
def check(cfg, generator, discriminator, shots, codes=None):
    """Raises ValueError, of one sentence, for what cannot be trained; warns of what hardly can."""
    ipl.check_generator(generator)
    k, R, sides = len(shots), generator.resolution, discriminator.resolution
    rssa, of_codes = cfg.method == "rssa", (k, generator.num_ws, generator.w_dim)
    for wrong, words in (
        (not k or shots.shape[1:] != (3, R, R) or not shots.isfinite().all(),
         f"shots are {list(shots.shape)}; wanted: [k, 3, {R}, {R}], finite, at least one"),
        (sides != R, f"D is of {sides} px and G of {R}; wanted: those of one training"),
        (cfg.batch % min(cfg.batch, discriminator.stddev_group),
         f"batch={cfg.batch}; wanted: a multiple of {discriminator.stddev_group}, D's groups"),
        (cfg.batch < {"cdc": 3, "rssa": 2}.get(cfg.method, 1),
         f"{cfg.method} compares the images of a batch, and batch={cfg.batch}; wanted: batch=4"),
        (cfg.freeze and len(learning(generator, cfg.freeze)) in (0, len(learning(generator, ""))),
         f"freeze={cfg.freeze!r} must fit some of what learns in G, not all; wanted: 'noise', ''"),
        (rssa and k < 2, "rssa draws all codes to the shots', and there is one; wanted: two shots"),
        (rssa and getattr(codes, "shape", 0) != of_codes, f"rssa; wanted: codes {list(of_codes)}"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(words)
    for wrong, words in (
        (cfg.method == "cdc" and k < 2, "cdc has an anchor for each shot, and there is one"),
        (cfg.steps * cfg.batch > 1000 * k, "D sees each shot 1000 times; wanted: fewer steps"),
        (cfg.ema**cfg.steps > 0.2, "the average will be the source still; wanted: a smaller ema"),
    ):
        if wrong:
            warnings.warn(words, stacklevel=3)


def lazy_adam(parameters, lr, every):
    """StyleGAN2's, where a regulariser has a step of its own in each n-th (1912.04958, app. B)."""
    c = every / (every + 1)
    return torch.optim.Adam(parameters, lr=c * lr, betas=(0.0, 0.99**c), fused=True)


def learning(G, freeze):
    """The parameters of G that learn (departure 9)."""
    named, mapping = G.named_parameters(), ("style.", "embed.")
    return [p for n, p in named if not (n.startswith(mapping) or (freeze and freeze in n))]


def take_step(adam, loss, parameters):
    """Of those parameters that the loss depends on: Adam passes over the others."""
    adam.zero_grad()
    loss.backward(inputs=parameters)
    adam.step()


def some_shots(shots, n, flip, rng):
    """n of the shots [k, 3, R, R], each as often as another; mirrored with probability flip."""
    index = torch.rand(-(-n // len(shots)), len(shots), generator=rng).argsort(1).flatten()[:n]
    x, mirrored = shots[index.to(shots.device)], torch.rand(n, 1, 1, 1, generator=rng) < flip
    return torch.where(mirrored.to(x.device), x.flip(3), x)


def mixed_codes(G, n, p, rng):
    """Codes W+ [n, W, w_dim] of z ~ N(0, I); with probability p, from some layer on of other z."""
    z = torch.randn(2 * n, G.z_dim, generator=rng).to(G.w_avg.device)
    cut, chance = int(torch.randint(1, G.num_ws, (), generator=rng)), torch.rand((), generator=rng)
    first = torch.arange(G.num_ws, device=z.device) < (cut if chance < p else G.num_ws)
    return torch.where(first[:, None], *G.mapping(z)[:, None].split(n))


def maps_of(G, w, noise=None):
    """The maps [B, C, S, S] of each styled convolution, after noise and activation: a list."""
    maps, layers = [], dict.fromkeys(G.layers())  # where the last one stands twice
    hooks = [x.register_forward_hook(lambda layer, args, y: maps.append(y)) for x in layers]
    G.synthesis(w, rng=noise)
    for hook in hooks:
        hook.remove()
    return maps


# -- 2. FreezeD, CR --------------------------------------------------------------------------------
def frozen_names(D, until):
    """FreezeD: the names of D's parameters from fromRGB through the blocks of R to `until` px."""
    blocks = int(math.log2(D.resolution)) - int(math.log2(until))
    prefixes = tuple(f"convs.{i}." for i in range(blocks + 1))
    return {name for name, _ in D.named_parameters() if name.startswith(prefixes)}


def transformed(x, flip, shift, rng):
    """T(x), images [B, 3, R, R]: mirrored with probability flip, then shifted by whole pixels,
    uniform up to shift R either way, filled with zeros; each image in its own way."""
    (B, _, _, R), reach = x.shape, round(shift * x.shape[-1])
    mirrored = (torch.rand(B, 1, 1, 1, generator=rng) < flip).to(x.device)
    by = torch.randint(2 * reach + 1, (2, B, 1), generator=rng)
    rows, columns = (by + torch.arange(R)).to(x.device)  # [B, R] each
    x = F.pad(torch.where(mirrored, x.flip(3), x), 4 * [reach])
    x = x.permute(0, 2, 3, 1)[torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None]]
    return x.permute(0, 3, 1, 2)


def logit_consistency(D, x, logits, cfg, rng):
    """CR: mean (D(T(x)) - D(x))^2, with a gradient through both; logits [B, 1] = D(x)."""
    return (D(transformed(x, cfg.cr_flip, cfg.cr_shift, rng)) - logits).square().mean()


# -- 3. CDC ----------------------------------------------------------------------------------------
def distance_consistency(source_maps, target_maps, layers):
    """CDC: whom an image is like stays the same.
        p_i = softmax over j != i of cos(f_i, f_j), at layer l_i, in each generator
        L_distance = mean over i and j of p_source (log p_source - log p_target)
    maps: as maps_of has them; layers [B]: l_i, indices into them.
    """
    B, log_p = len(layers), []
    others = ~torch.eye(B, dtype=torch.bool, device=layers.device)
    for maps in (source_maps, target_maps):
        flat = [F.normalize(x.flatten(1), dim=1) for x in maps]
        cosines = torch.stack([f @ f.T for f in flat])[layers, torch.arange(B)]  # [B, B]
        log_p.append(cosines[others].view(B, B - 1).log_softmax(1))
    return (log_p[0].exp() * (log_p[0] - log_p[1])).mean()


def patch_place(resolution, part=66 / 256):
    """Where in D a 3x3 head sees nearly this part of a side: (block, convolutions passed in it)."""
    field, stride, places = 1, 1, {}  # of what a number of the map sees, in pixels
    for block in range(1, int(math.log2(resolution)) - 1):
        field += 2 * stride  # conv1, 3x3
        places[block, 1] = field + 2 * stride
        field += 5 * stride  # conv2, a blur of 4x4 and 3x3, of stride 2
        stride *= 2
        places[block, 2] = field + 2 * stride
    return min(places, key=lambda place: abs(places[place] - part * resolution))


def patch_head(D, place, rng):
    """A fresh 3x3 convolution to one channel, with bias and leaky ReLU."""
    block, passed = place
    head = EqualConv(D.channels[D.resolution >> block + passed - 2], 1, 3, padding=1)
    head.weight.data = torch.randn(head.weight.shape, generator=rng)
    return nn.Sequential(head, Activation(1))


def patch_logits(D, head, images, place):
    """images [B, 3, R, R] -> logits [B, 1, S, S] of patches, through D's own first layers."""
    block, passed = place
    images = images.contiguous(memory_format=torch.channels_last)
    x = D.convs[block].conv1(D.convs[:block](images))
    return head(D.convs[block].conv2(x) if passed == 2 else x)


# -- 4. DAG ----------------------------------------------------------------------------------------
def transforms(policy):
    """Functions of images [B, 3, R, R]; the identity is the first."""
    def corner(x, far):  # 3/4 of the side, enlarged by the nearest pixel
        n = x.shape[-1] * 3 // 4
        rows, columns = (slice(-n, None) if end else slice(n) for end in far)
        return F.interpolate(x[:, :, rows, columns], x.shape[-2:], mode="nearest")
    turns = [lambda x, k=k: x.rot90(k, (2, 3)) for k in range(4)]
    corners = [lambda x, far=far: corner(x, far) for far in ((0, 0), (0, 1), (1, 0), (1, 1))]
    fliprot = [turns[0], lambda x: x.flip(2), lambda x: x.flip(3), turns[1]]
    return {"rotation": turns, "fliprot": fliprot, "cropping": [turns[0], *corners]}[policy]


def augmented_loss(D, heads, loss, images, cfg, rng):
    """DAG: sum over policies of 1/n sum_j L_j(T_j x, T_j G(z)), of D; of G without x. L_j: loss of
    the logits of heads[policy][j]. With dag_all off, of one j instead of the mean."""
    total = 0
    for policy, linears in heads.items():
        pairs = [*zip(transforms(policy), linears, strict=True)]
        if not cfg.dag_all:
            pairs = [pairs[int(torch.randint(len(pairs), (), generator=rng))]]
        parts = [loss(*(linear(D.features(T(x))) for x in images)) for T, linear in pairs]
        total = total + sum(parts) / len(parts)
    return total


# -- 5. RSSA ---------------------------------------------------------------------------------------
def windows(x, side):
    """Unit columns of maps [B, C, S, S], of windows side by side: [B, P, side^2, C]."""
    return F.unfold(x, side, stride=side).unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1)


def self_correlation(source, target):
    """RSSA, within an image: of one map [B, C, S, S], A = f f^T of its unit columns f, at S / 2, in
    the four quadrants and in a fifth one in the middle.
        L = SmoothL1(A_source, A_target), mean over the quadrants, + that of the middle
    """
    total, n = 0, source.shape[-1] // 2
    maps = [F.avg_pool2d(F.normalize(x, dim=1), 2) for x in (source, target)]
    middle = slice(n // 4, n - n // 4)
    for part in (maps, [x[:, :, middle, middle] for x in maps]):
        f = [windows(x, n // 2) for x in part]
        total = total + F.smooth_l1_loss(f[0] @ f[0].mT, f[1] @ f[1].mT)
    return total


def cross_correlation(source, target, cuts=1):
    """RSSA, between images: of one map, of each pair i < j, in windows of 1 / cuts of the side.
        p = softmax of f_i f_j^T over the N positions in image j;  L = N mean |p_source - p_target|
    """
    side = source.shape[-1] // cuts
    i, j = torch.triu_indices(len(source), len(source), 1, device=source.device)
    f = [windows(F.normalize(x, dim=1), side) for x in (source, target)]
    return side**2 * F.l1_loss(*((x[i] @ x[j].mT).softmax(-1) for x in f))


def structural_loss(loss, source_maps, target_maps):
    """self_correlation's sum over the maps from R / 4 up, or cross_correlation's over those up to
    the first of R / 2, in 4 x 4 windows from R / 4 up."""
    sides = [x.shape[-1] for x in source_maps]
    R, pairs = sides[-1], [*zip(source_maps, target_maps, strict=True)]
    if loss is self_correlation:
        return sum(loss(*pair) for pair, S in zip(pairs, sides, strict=True) if S >= R // 4)
    cuts = [4 if S >= R // 4 else 1 for S in sides[: sides.index(R // 2) + 1]]
    return sum(loss(*pair, n) for pair, n in zip(pairs, cuts, strict=False))


def compressor(codes, resolution, table):
    """RSSA: a function of codes w [B, W, w_dim], w' = s |w| Pw / |Pw| + (1 - s) w, layer by layer;
    P: onto the span of the shots' codes [k, W, w_dim]; s: of a layer of R / 2^i pixels table[i]."""
    A, W = codes.double().cpu().transpose(0, 1), codes.shape[1]
    P = (torch.linalg.pinv(A) @ A).to(codes)  # [W, w_dim, w_dim]
    halvings = [max(0, int(math.log2(resolution)) - 2 - (j + 1) // 2) for j in range(W)]
    s = codes.new_tensor([*table, *[0] * 99])[halvings][:, None]
    def compress(w):
        inside = torch.einsum("bwi,wij->bwj", w, P)
        scale = w.norm(dim=-1, keepdim=True) / inside.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        return s * scale * inside + (1 - s) * w
    return compress


# -- 6. EWC ----------------------------------------------------------------------------------------
def fisher_information(G, D, parameters, n, rng):
    """EWC: F_i = E_z (d log sigmoid(D(G(z))) / d theta_i)^2, of n single draws, a tensor each."""
    noise = torch.Generator(G.w_avg.device).manual_seed(0)
    total = [torch.zeros_like(p) for p in parameters]
    for _ in trange(n, desc="Fisher information", disable=None):
        z = torch.randn(1, G.z_dim, generator=rng).to(G.w_avg.device)
        loss = generator_loss(D(G.synthesis(G.mapping(z), rng=noise)))  # -log sigmoid
        for F_i, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            F_i += g.square() / n
    return total


def elastic_penalty(parameters, start, fisher):
    """EWC: sum_i F_i (theta_i - theta_source,i)^2."""
    return sum((f * (p - q) ** 2).sum() for f, p, q in zip(fisher, parameters, start, strict=True))


# -- 7. The loop -----------------------------------------------------------------------------------
@ipl.plain_torch()
def adapt(cfg, generator, discriminator, shots, *, rng, codes=None, steps=ipl.progress):
    """-> the moving average of the adapted generator, the history, and the state that is left.

    generator, discriminator: stylegan2_ops', of one training; both stay as they are. shots
    [k, 3, R, R] in [-1, 1]. codes [k, W, w_dim]: for rssa, the shots' in the source generator.
    rng: a torch.Generator on the CPU; what a method draws for itself comes from another, so that
    with weight 0 each gives tgan's bits (cdc, rssa: if anchors=False, image_every=1,
    compression=()). steps: as ipl.progress. In state, "G" and "D" are the networks. A row has the
    losses, the mean logits "real" and "fake", and "r1", "path" and a method's own where due.
    Raises ValueError for arguments, FloatingPointError if a loss is not finite.
    """
    check(cfg, generator, discriminator, shots, codes)
    device, method = generator.w_avg.device, cfg.method
    seed, own_seed = torch.randint(2**31, (2,), generator=rng).tolist()
    own, shots = torch.Generator().manual_seed(own_seed), shots.to(device)
    source = copy.deepcopy(generator).requires_grad_(False)
    G, D = (copy.deepcopy(x).requires_grad_() for x in (generator, discriminator))
    D.stddev_group = 1 if len(shots) < cfg.batch else D.stddev_group  # departure 2
    average = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    average.requires_grad_(False).n_averaged.fill_(1)  # the source counts: the first step averages
    extras, alike = nn.ModuleDict(), method in ("cdc", "rssa")  # what these two share
    if alike:
        place = patch_place(G.resolution)
        extras["patches"] = patch_head(D, place, own)
        extras.register_buffer("anchors", torch.randn(len(shots), G.z_dim, generator=own))
    for policy in cfg.dag_policies if method == "dag" else ():
        extras[policy] = nn.ModuleList(copy.deepcopy(D.final_linear[1]) for _ in transforms(policy))
    extras.to(device)
    if method == "rssa":
        compress = compressor(codes.to(device), G.resolution, cfg.compression)
    frozen = frozen_names(D, cfg.freeze_until) if method == "freezed" else ()
    learn_d = [p for name, p in D.named_parameters() if name not in frozen] + [*extras.parameters()]
    learn_g, start = (learning(network, cfg.freeze) for network in (G, source))
    if method == "ewc":
        fisher = fisher_information(G, D, learn_g, cfg.ewc_draws, own)
    adam_d = lazy_adam(learn_d, cfg.lr, cfg.r1_every)
    adam_g = lazy_adam(learn_g, cfg.lr, cfg.path_every)
    def drawn(whole, noise):  # images of G for D
        if alike and whole and cfg.anchors:
            z = extras.anchors.cpu()[torch.randint(len(shots), (cfg.batch,), generator=own)]
            z = torch.normal(z, cfg.anchor_spread, generator=own).to(device)
            w = G.mapping(z)[:, None].expand(-1, G.num_ws, -1)
        else:
            w = mixed_codes(G, cfg.batch, cfg.mixing, rng)
        return G.synthesis(compress(w) if method == "rssa" else w, rng=noise)
    def compared(noises=(None, None), compress=None):  # maps of source and G, of the same new z
        z, maps = torch.randn(cfg.batch, G.z_dim, generator=own).to(device), []
        for network, noise in zip((source, G), noises, strict=True):
            w = network.mapping(z)[:, None].expand(-1, G.num_ws, -1)
            maps.append(maps_of(network, compress(w) if compress else w, noise))
        return maps
    history, mean_length = [], [0.0]
    state = {"G": G, "D": D, "extras": extras, "average": average, "adam_d": adam_d}
    state |= {"adam_g": adam_g, "mean_length": mean_length, "rng": rng, "own": own}
    for step in steps("few-shot", cfg.steps, state | {"history": history}):
        seeds = [seed + 3 * step + i for i in range(3)]
        noise, *noises = (torch.Generator(device).manual_seed(x) for x in seeds)
        whole = not alike or step % cfg.image_every == 0
        judge = D if whole else lambda x: patch_logits(D, extras["patches"], x, place)
        x = some_shots(shots, cfg.batch, cfg.flip, rng)  # D
        with torch.no_grad():
            fake = drawn(whole, noise)
        real_logits, fake_logits = judge(x), judge(fake)
        loss_d = discriminator_loss(real_logits, fake_logits)
        row = {"loss_d": loss_d, "real": real_logits.mean(), "fake": fake_logits.mean()}
        if method == "cr":
            row["consistency"] = logit_consistency(D, x, real_logits, cfg, own)
            loss_d = loss_d + cfg.cr * row["consistency"]
            if cfg.cr_fake:
                loss_d = loss_d + cfg.cr_fake * logit_consistency(D, fake, fake_logits, cfg, own)
        if method == "dag":
            row["dag_d"] = augmented_loss(D, extras, discriminator_loss, [x, fake], cfg, own)
            loss_d = loss_d + cfg.dag * row["dag_d"]
        take_step(adam_d, loss_d, learn_d)
        if step % cfg.r1_every == 0:
            row["r1"] = r1_penalty(D, x)
            take_step(adam_d, cfg.r1 / 2 * cfg.r1_every * row["r1"], learn_d)
        fake = drawn(whole, noise)  # G
        fake.register_hook(torch.Tensor.contiguous)  # the last bits depend on a gradient's layout
        loss = generator_loss(judge(fake))
        if method == "cdc":
            maps = compared() if cfg.same_noise else compared(noises)
            layers = torch.randint(1, len(maps[0]), (cfg.batch,), generator=own).to(device)
            row["distance"] = distance_consistency(*maps, layers)
            loss = loss + cfg.distance * row["distance"]
        if method == "dag":
            row["dag"] = augmented_loss(D, extras, generator_loss, [fake], cfg, own)
            loss = loss + cfg.dag * row["dag"]
        if method == "rssa":
            row["self"] = structural_loss(self_correlation, *compared(compress=compress))
            loss = loss + cfg.self_weight * row["self"]
            if step % cfg.cross_every == 0:
                row["cross"] = structural_loss(cross_correlation, *compared())
                loss = loss + cfg.cross_weight * row["cross"]
        if method == "ewc":
            row["elastic"] = elastic_penalty(learn_g, start, fisher)
            loss = loss + cfg.ewc * row["elastic"]
        take_step(adam_g, loss, learn_g)
        grad_norm = nn.utils.get_total_norm([p.grad for p in learn_g if p.grad is not None])
        if step % cfg.path_every == 0:
            w = mixed_codes(G, max(1, cfg.batch // 2), cfg.mixing, rng)
            images = G.synthesis(w, rng=noise)
            lengths = path_lengths(images, w, torch.empty_like(images).normal_(generator=noise))
            mean_length[0] += 0.01 * (lengths.mean().item() - mean_length[0])
            row["path"] = (lengths - mean_length[0]).square().mean()
            take_step(adam_g, cfg.path * cfg.path_every * row["path"], learn_g)
        row |= {"stage": "few-shot", "step": step, "loss": loss, "grad_norm": grad_norm}
        history.append(ipl.finite_row("wanted: a smaller lr", **row))
        average.update_parameters(G)
    return average.module, history, state
