"""Image-specific prompt learning (IPL, CVPR 2023, arXiv 2304.03119) in one file.

A generator of one domain ("photo") learns another ("anime") from the two words and CLIP alone:
  1. a mapper F turns each latent w into m prompt vectors, P = F(w): a prompt for every image;
  2. stage 1 trains F: "[P] photo" must match the image of w, and "[P] anime" must mean anime;
  3. the step from "[P] photo" to "[P] anime" in CLIP's text space is that image's own direction;
  4. stage 2 trains a copy of the generator: its images must move that way in CLIP's image space;
  5. NADA, the baseline, is the same second stage with one direction for all images.

    z --G.mapping--> w --F--> P --[SOS] P label [EOT]--> E_T --> t_source, t_target
                     +--G_source.synthesis--> x_source --> E_I --+  stage 1: contrastive + domain
                     +--G_target.synthesis--> x_target --> E_I --+  stage 2: directional

Axes: B batch, m = n_ctx prompt vectors, d CLIP's text width, e CLIP's joint width, L tokens,
R resolution, W = num_ws, the number of w inputs of the synthesis network.

  equation                                             function            notebook
  P = F(w)                                             LatentMapper        01_mapper
  t = E_T([SOS] P label [EOT])                         encode_prompts      02_prompts
  L_contr = 1/2 [CE(s I T', diag) + CE(s T I', diag)]  contrastive_loss    03_losses
  L_domain = mean[1 - cos(t_target, ensemble)]         domain_loss         03_losses
  L_stage2 = mean[1 - cos(delta_image, delta_text)]    directional_loss    03_losses
  L_stage1 = L_contr + lambda L_domain, over F         train_mapper        04_stage1
  top k of mean |change of W+|                         select_layers       05_stage2
  L_stage2 over G_target, and its moving average       adapt_generator     05_stage2

Usage
  python ipl.py --source photo --target anime                           the miniature, on a CPU
  python ipl.py --generator ffhq.pkl --clip ViT-B/32 --target Disney    any StyleGAN2
  torchrun --nproc_per_node 4 ipl.py --batch 4 ...                      shares each step's batch
  python ipl.py sample | convert | inspect --help
To copy it: the file needs torch, numpy and clip (which brings tqdm); train_mapper and
adapt_generator take any generator that fits the protocol of section 1.

Where it departs from the published code (its file:line in brackets)
 1. Residual prompts. The published code adds the feature of a fixed text to that of the learned
    prompt: of "a photo of a photo." and "a photo of a anime." in stage 1, but in stage 2 both
    times of "a photo of a", without the label. `--residual published` (the default) does exactly
    this, `label` keeps the label in both stages, `none` adds nothing, as in the paper.
    [clip_loss.py:206,212,242; train.py:215]
 2. Layer choice is off by one there: index j >= 2 of W+ feeds convolution j - 1 but frees j - 2,
    and index 1 frees a ToRGB layer. Here the layer that is fed is the layer that is freed.
 3. The directional loss divides by |delta_image|, which is 0/0 for equal images. There, and by
    default here (`--eps 0 --noise fresh`), each generator draws its own noise and no two images
    are equal. `--eps` > 0 divides by sqrt(|delta_image|^2 + eps^2) and allows `--noise fixed`.
    [clip_loss.py:225-226; ZSSGAN.py:281-283]
 4. Images are resized for CLIP with antialiasing; torchvision 0.9, as used there, had none.
 5. CLIP runs in float32, there in float16. `--autocast clip` runs its image encoder in bfloat16.
 6. n_ctx counts prompt vectors, there the words of ctx_init. [train.py:79-80,112]
 7. Samples are truncated towards the generator's own average; there it is drawn anew each time.
 8. Work that changes no number is left out: fixed texts are encoded once, prompts are not padded
    to 77 tokens, CLIP collects no gradients, and neither do weights in the layer choice, which
    looks at no more images at a time than the step trains. [clip_loss.py:249-251,256-257]
 9. `--crop`, `--freeze` and `--layers all` are ours, and off by default.
10. Processes that share a batch draw fresh noise from seeds of their own.
"""

import copy
import math
import sys
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import trange

with warnings.catch_warnings(action="ignore"):  # clip imports pkg_resources, which is deprecated
    import clip

# ----------------------------------------------------------------------------------------------
# 0. Configuration. The defaults are the published values; the comments are the --help texts.


@dataclass(frozen=True)
class Config:
    source: str = "photo"  # What the generator draws, in words.
    target: str = "anime"  # What it shall draw, in words.
    # StyleGAN2 checkpoint of the source domain: file or URL. None: the miniature and its defaults.
    generator: str | None = None
    class_index: int | None = None  # The class that a conditional generator draws.
    # CLIPs, each a name of clip.available_models() or a file; else the miniature's, or ViT-B/32.
    clip: tuple[str, ...] = ()
    clip_weights: tuple[float, ...] = ()  # Weight of each CLIP in stage 2; else 1.
    # Image-specific prompts; or NADA's one direction for all images, which needs no stage 1.
    method: Literal["ipl", "nada"] = "ipl"
    # Run folder; of several --target, the folder of theirs. None: runs/<source>-to-<target>[-nada].
    out: str | None = None
    overwrite: bool = False  # Replace the run that is in the folder.
    resume: bool = False  # Go on with it where it was stopped, to the same result.
    save_every: int = 50  # Steps after which the unfinished run is saved; also if it is stopped.
    seed: int = 0  # Of everything random; latents, crops and samples are those of any device.
    device: str = "auto"  # auto, cpu, cuda or cuda:<n>.
    deterministic: bool = False  # On a GPU, only kernels that repeat their bits, where there are.

    n_ctx: int = 4  # Prompts: number of learned vectors, m.
    ctx_init: str = "a photo of a"  # Prompts: the fixed text of residual prompts.
    residual: Literal["published", "label", "none"] = "published"  # Prompts: deviation 1 of ipl.py.

    lr_mapper: float = 0.05  # Stage 1: Adam's learning rate.
    batch_mapper: int = 32  # Stage 1: images per step.
    steps_mapper: int = 300  # Stage 1: number of steps.
    lambda_domain: float = 1.0  # Stage 1: weight of the domain loss.
    lambda_source: float = 0.0  # Stage 1: the source label's part in it; the target's is 1.

    lr: float = 0.002  # Stage 2: learning rate; Adam gets 4/5 of it, as in StyleGAN2.
    batch: int = 2  # Stage 2: images per step.
    steps: int = 300  # Stage 2: number of steps.
    ema: float = 0.99  # Stage 2: decay of the moving average, which is the result.
    eps: float = 0.0  # Stage 2: smooths |delta_image| near 0; deviation 3 of ipl.py.
    # Synthesis noise of both stages: drawn anew for every image, or the generator's own.
    noise: Literal["fresh", "fixed"] = "fresh"
    # Stage 2: the same random crop of source and target image, by up to this part of the side.
    crop: float = 0.0
    layers: Literal["adaptive", "all"] = "adaptive"  # Stage 2: layers trained in each step.
    num_layers: int | None = None  # Adaptive choice: how many. None: two thirds.
    layer_batch: int = 8  # Adaptive choice: number of latents.
    layer_lr: float = 0.01  # Adaptive choice: step size; of one step, it cannot change the choice.
    freeze: str = ""  # Stage 2: leave parameters with this in their name alone, e.g. noise.

    # Faster, with other numbers (README: which cost quality): half precision for CLIP's image
    # encoder, or for the generators as well.
    autocast: Literal["none", "clip", "all"] = "none"
    half: Literal["bf16", "fp16"] = "bf16"  # The half precision of --autocast.
    layer_every: int = 1  # Adaptive choice: made in every n-th step, and kept in between.
    compile: bool = False  # CLIP's image encoder through torch.compile; on a GPU, in CUDA graphs.
    tf32: bool = False  # On a GPU, TensorFloat-32 for what is not in half precision.

    truncation_psi: float = 0.7  # Samples: truncation.
    samples: int = 8  # Samples: how many are drawn at the end.


# The miniature's networks are small and learn at other rates: its runs start from these values.
MINIATURE = Config(
    residual="none", lr_mapper=1.0, batch_mapper=16, steps_mapper=120, lambda_domain=2.0,
    lambda_source=1.0, lr=0.006, batch=4, steps=250, eps=0.1, noise="fixed", crop=0.15,
    layers="all", freeze="noise", autocast="clip", truncation_psi=1.0,
)  # fmt: skip

# ----------------------------------------------------------------------------------------------
# 1. What we need of a generator


class Generator(Protocol):
    """An nn.Module with these attributes and methods."""

    z_dim: int
    w_dim: int
    num_ws: int  # W
    resolution: int  # R
    w_avg: torch.Tensor  # [w_dim], the centre of truncation

    def mapping(self, z):
        """z [B, z_dim] -> w [B, w_dim]."""

    def synthesis(self, w, *, rng=None):
        """w [B, w_dim] or [B, W, w_dim] -> images [B, 3, R, R] in [-1, 1], not clamped.

        rng: None for the fixed noise; a torch.Generator for fresh noise drawn from it.
        """

    def layers(self):
        """W modules, those that stage 2 may train; layers()[j] is what w index j feeds."""


def truncate(w, w_avg, psi):
    """w drawn towards the average latent: fewer oddities, less variety."""
    return w_avg + psi * (w - w_avg)


# ----------------------------------------------------------------------------------------------
# 2. CLIP and its image transform

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_clip(name_or_path, device="cpu"):
    """A CLIP, frozen and in float32, and its transform of images.

    A name goes to clip.load, which downloads the model once and knows its checksum. A file is a
    state dict under OpenAI's key names, or a TorchScript archive, in which OpenAI publishes them.
    Only tensors are read: torch.jit.load, as in clip.load, would compile and run an archive's code.
    Raises ValueError, of one line.
    """
    name, names = str(name_or_path), clip.available_models()
    if name not in names and not Path(name).is_file():
        raise ValueError(f"CLIP {name!r} is neither a file nor one of {', '.join(names)}")
    try:
        if name in names:
            clip_model, _ = clip.load(name, device="cpu", jit=False)
        else:
            try:
                with warnings.catch_warnings(action="ignore"):
                    state_dict = torch.load(name, map_location="cpu", weights_only=True)
            except RuntimeError:  # such as that this is a TorchScript archive
                from checkpoints.pickles import read_script

                state_dict = read_script(Path(name).read_bytes())
            clip_model = clip.model.build_model(state_dict).float()
            clip_model.load_state_dict(state_dict)  # build_model has rounded it to float16
    except Exception as error:  # whatever a download or a foreign file can raise
        if "memory" in str(error):
            raise
        raise ValueError(
            f"CLIP {name!r} cannot be loaded ({type(error).__name__}); wanted: a file of tensors "
            "under OpenAI's key names or, when online, the name of one of OpenAI's models"
        ) from error
    clip_model = clip_model.float().requires_grad_(False).eval().to(device)
    return clip_model, lambda images: clip_transform(images, clip_model.visual.input_resolution)


def clip_transform(images, resolution):
    """CLIP's preprocessing on tensors: images [B, 3, H, W] in [-1, 1] -> [B, 3, r, r].

    Differentiable, and without a clamp: a pixel outside [-1, 1] keeps its gradient.
    """
    x = (images + 1) / 2
    H, W = x.shape[-2:]
    short = min(H, W)
    if short != resolution:
        size = (H * resolution // short, W * resolution // short)
        x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
    top, left = (round((side - resolution) / 2) for side in x.shape[-2:])
    x = x[..., top : top + resolution, left : left + resolution]
    return (x - x.new_tensor(CLIP_MEAN)[:, None, None]) / x.new_tensor(CLIP_STD)[:, None, None]


def half_precision(cfg, tensor, *parts):
    """Autocast, if cfg.autocast is one of the parts."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[cfg.half]
    return torch.autocast(tensor.device.type, kind, enabled=cfg.autocast in parts)


def synthesize(cfg, generator, w, rng=None):
    """Images of w, as generator.synthesis makes them, or in half precision."""
    with half_precision(cfg, w, "all"):
        return generator.synthesis(w, rng=rng).float()


def image_encoder(clip_model, transform, cfg=None):
    """E_I: images [B, 3, R, R] in [-1, 1] -> features [B, e], not normalised."""
    cfg, encode = cfg or Config(), clip_model.encode_image
    if cfg.compile:
        graphs = "reduce-overhead" if clip_model.logit_scale.is_cuda else "default"
        encode = torch.compile(encode, mode=graphs)

    def encode_images(images):
        with half_precision(cfg, images, "clip", "all"):
            return encode(transform(images)).float()

    return encode_images


# ----------------------------------------------------------------------------------------------
# 3. The latent mapper


class LatentMapper(nn.Module):
    """F: w -> P, a prompt for each image; in the shape of StyleGAN's mapping network.

    Pixel norm, then four linear layers with equalised learning rate (multiplier 0.01), each
    followed by leaky ReLU (slope 0.2, gain sqrt(2)) - the last one too, as published.
    """

    lr_mul = 0.01

    def __init__(self, w_dim, n_ctx, ctx_dim, rng=None):
        super().__init__()
        self.n_ctx, self.ctx_dim = n_ctx, ctx_dim
        widths = [w_dim, w_dim, w_dim, w_dim, n_ctx * ctx_dim]
        self.weights = nn.ParameterList(
            torch.randn(after, before, generator=rng) / self.lr_mul
            for before, after in pairwise(widths)
        )
        self.biases = nn.ParameterList(torch.zeros(after) for after in widths[1:])

    def forward(self, w):
        """w [B, w_dim] -> ctx [B, n_ctx, ctx_dim]."""
        x = w * (w.square().mean(dim=-1, keepdim=True) + 1e-8).rsqrt()
        for weight, bias in zip(self.weights, self.biases, strict=True):
            scale = self.lr_mul / math.sqrt(weight.shape[1])
            x = F.linear(x, weight * scale, bias * self.lr_mul)
            x = F.leaky_relu(x, 0.2) * math.sqrt(2)
        return x.unflatten(-1, (self.n_ctx, self.ctx_dim))


# ----------------------------------------------------------------------------------------------
# 4. Prompts

# The templates of OpenAI's CLIP notebook (MIT), 79 as published: without "a photo of many {}."
TEMPLATES = """
    a bad photo of a {}. | a sculpture of a {}. | a photo of the hard to see {}. | a low resolution
    photo of the {}. | a rendering of a {}. | graffiti of a {}. | a bad photo of the {}. | a cropped
    photo of the {}. | a tattoo of a {}. | the embroidered {}. | a photo of a hard to see {}. | a
    bright photo of a {}. | a photo of a clean {}. | a photo of a dirty {}. | a dark photo of the
    {}. | a drawing of a {}. | a photo of my {}. | the plastic {}. | a photo of the cool {}. | a
    close-up photo of a {}. | a black and white photo of the {}. | a painting of the {}. | a
    painting of a {}. | a pixelated photo of the {}. | a sculpture of the {}. | a bright photo of
    the {}. | a cropped photo of a {}. | a plastic {}. | a photo of the dirty {}. | a jpeg corrupted
    photo of a {}. | a blurry photo of the {}. | a photo of the {}. | a good photo of the {}. | a
    rendering of the {}. | a {} in a video game. | a photo of one {}. | a doodle of a {}. | a
    close-up photo of the {}. | a photo of a {}. | the origami {}. | the {} in a video game. | a
    sketch of a {}. | a doodle of the {}. | a origami {}. | a low resolution photo of a {}. | the
    toy {}. | a rendition of the {}. | a photo of the clean {}. | a photo of a large {}. | a
    rendition of a {}. | a photo of a nice {}. | a photo of a weird {}. | a blurry photo of a {}. |
    a cartoon {}. | art of a {}. | a sketch of the {}. | a embroidered {}. | a pixelated photo of a
    {}. | itap of the {}. | a jpeg corrupted photo of the {}. | a good photo of a {}. | a plushie
    {}. | a photo of the nice {}. | a photo of the small {}. | a photo of the weird {}. | the
    cartoon {}. | art of the {}. | a drawing of the {}. | a photo of the large {}. | a black and
    white photo of a {}. | the plushie {}. | a dark photo of a {}. | itap of a {}. | graffiti of the
    {}. | a toy {}. | itap of my {}. | a photo of a cool {}. | a photo of a small {}. | a tattoo of
    the {}.
"""
TEMPLATES = tuple(" ".join(TEMPLATES.split()).split(" | "))


def tokenize(clip_model, texts):
    """Tokens [N, L], cut to the longest text, and the position [N] of each one's EOT."""
    try:
        tokens = clip.tokenize(texts, context_length=clip_model.context_length)
    except RuntimeError as error:  # "Input ... is too long for context length 77"
        raise ValueError(f"{error}; wanted: shorter labels, or --ctx-init") from error
    eot = tokens.argmax(dim=-1)  # EOT has the highest number of all tokens
    device = clip_model.positional_embedding.device
    return tokens[:, : int(eot.max()) + 1].long().to(device), eot.to(device)


def encode_embeddings(clip_model, x, eot):
    """CLIP's text encoder from the embeddings on: x [N, L, d], eot [N] -> features [N, e].

    The same as clip_model.encode_text, at any length L. Attention is causal: nothing behind EOT
    can change the feature that is read there, so padding to 77 tokens only costs time.
    """
    N, L, _ = x.shape
    x = x + clip_model.positional_embedding[:L]
    causal_mask = torch.full((L, L), -math.inf, device=x.device).triu(1)
    x = x.transpose(0, 1)  # NLD -> LND
    for block in clip_model.transformer.resblocks:  # not block(x): its own mask is 77 x 77
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=causal_mask)[0]
        x = x + block.mlp(block.ln_2(x))
    x = clip_model.ln_final(x)[eot, torch.arange(N, device=x.device)]  # [N, d]
    return x @ clip_model.text_projection


def encode_texts(clip_model, texts):
    """E_T of N whole texts -> features [N, e], not normalised."""
    tokens, eot = tokenize(clip_model, texts)
    return encode_embeddings(clip_model, clip_model.token_embedding(tokens), eot)


def construct_prompts(clip_model, ctx, label):
    """[SOS] ctx label [EOT] as embeddings: ctx [B, n_ctx, d] -> [B, L, d].

    Raises ValueError if that is longer than CLIP reads.
    """
    B, n_ctx, _ = ctx.shape
    tokens, _ = tokenize(clip_model, label)  # [1, L - n_ctx]
    L, limit = n_ctx + tokens.shape[1], clip_model.context_length
    if L > limit:
        raise ValueError(f"{n_ctx} vectors and {label!r} make {L} tokens; this CLIP reads {limit}")
    text = clip_model.token_embedding(tokens).expand(B, -1, -1)  # [SOS] label [EOT]
    return torch.cat([text[:, :1], ctx, text[:, 1:]], dim=1)


def encode_prompts(clip_model, ctx, label):
    """t = E_T([SOS] ctx label [EOT]): ctx [B, n_ctx, d] -> [B, e], not normalised."""
    prompts = construct_prompts(clip_model, ctx, label)
    eot = torch.full(prompts.shape[:1], prompts.shape[1] - 1, device=prompts.device)
    return encode_embeddings(clip_model, prompts, eot)


def label_features(clip_model, label, templates=TEMPLATES):
    """What a label means in general: the mean [e] of its normalised features in many sentences."""
    texts = [template.format(label) for template in templates]
    return F.normalize(encode_texts(clip_model, texts), dim=-1).mean(dim=0)


def residual_features(cfg, clip_model, stage):
    """What is added to the features of source and target prompts, [2, e] (deviation 1)."""
    texts = [f"{cfg.ctx_init} {label}." for label in (cfg.source, cfg.target)]
    if cfg.residual == "published" and stage == 2:
        texts = [cfg.ctx_init, cfg.ctx_init]
    return encode_texts(clip_model, texts) * (cfg.residual != "none")


def prompt_features(cfg, clip_model, mapper, stage):
    """w -> the features [B, e] of source and target prompts, not normalised."""
    residuals = residual_features(cfg, clip_model, stage)

    def features_of(w):
        ctx = mapper(w)  # [B, n_ctx, d]
        prompts = [construct_prompts(clip_model, ctx, label) for label in (cfg.source, cfg.target)]
        lengths = torch.tensor([prompt.shape[1] for prompt in prompts])
        longest = int(lengths.max())
        x = torch.cat([F.pad(p, (0, 0, 0, longest - p.shape[1])) for p in prompts])  # [2 B, L, d]
        eot = (lengths - 1).repeat_interleave(len(w)).to(w.device)
        source, target = encode_embeddings(clip_model, x, eot).chunk(2)  # both in one pass
        return source + residuals[0], target + residuals[1]

    return features_of


# ----------------------------------------------------------------------------------------------
# 5. Losses: a function for each equation, on features [B, e] of any scale


def feature_delta(source_features, target_features):
    """norm(target) - norm(source): the step between two features, for images and for texts."""
    return F.normalize(target_features, dim=-1) - F.normalize(source_features, dim=-1)


def contrastive_loss(image_features, text_features, logit_scale):
    """L_contr: each image matches its own prompt and no other of the batch, and vice versa.

    A prompt that all images share makes the image-to-text half exactly log B, whatever it says.
    """
    image_features = F.normalize(image_features, dim=-1)
    text_features = F.normalize(text_features, dim=-1)
    logits = logit_scale * image_features @ text_features.T  # [B, B]
    match = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2


def domain_loss(text_features, label_feature):
    """L_domain: whatever is in front of it, the label [e] keeps its meaning."""
    return (1 - F.cosine_similarity(text_features, label_feature, dim=-1)).mean()


def directional_loss(source_image_features, target_image_features, text_direction, eps=0.0):
    """L_stage2: each image moves along its text direction, [B, e] or one [e] for all.

    eps = 0 is the published loss, 0/0 for equal images. Near them its gradient grows as
    1 / |delta_image|, and Adam, which remembers the largest, then hardly moves for thousands of
    steps; with eps > 0 the gradient stays below 1 / eps (deviation 3).
    """
    delta_image = feature_delta(source_image_features, target_image_features)  # [B, e]
    delta_text = F.normalize(text_direction, dim=-1)
    length = (delta_image.square().sum(dim=-1) + eps**2).sqrt()  # [B]
    return (1 - (delta_image * delta_text).sum(dim=-1) / length).mean()


def summed(cfg, loss):
    """`loss` summed over CLIPs by cfg.clip_weights: of lists, with an entry for each CLIP."""

    def total(*lists):
        weights = cfg.clip_weights or [1.0] * len(lists[0])
        return sum(weight * loss(*x) for weight, *x in zip(weights, *lists, strict=True))

    return total


# ----------------------------------------------------------------------------------------------
# 6. Layer choice


def select_layers(
    generator, encode_images, w, text_feature, k, *, lr=0.01, rng=None, loss=domain_loss, at_once=8
):
    """The k of W inputs that matter most for a text: their indices, and the weights [W] of all.

    Take one step of SGD on the W+ codes of some images towards the text: the inputs that move
    furthest are those whose layers can bring it. That step is -lr * gradient, and only W+ needs
    a gradient, no weight of the generator. No image's gradient depends on another's: only at_once
    of them are in memory. loss: a mean, of what encode_images returns and text_feature.
    """
    weights = 0
    for codes in w.split(at_once):
        share = len(codes) / len(w)  # of the loss, a mean over the images, and of the weights
        w_plus = codes[:, None].repeat(1, generator.num_ws, 1).requires_grad_()  # [., W, w_dim]
        features = encode_images(generator.synthesis(w_plus, rng=rng))
        (grad,) = torch.autograd.grad(share * loss(features, text_feature), w_plus)
        weights = weights + share * (lr * grad).abs().mean(dim=(0, 2))  # [W]
    sum_over_processes([weights])  # ranks differ in nothing else, and agree
    return weights.topk(k).indices.tolist(), weights


# ----------------------------------------------------------------------------------------------
# 7. Many processes: each draws the whole batch and works on its own rows; features are gathered


def ranks():
    """Which process of how many this is."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own(x):
    """This process's rows of a batch that all have drawn alike."""
    return x.unflatten(0, (ranks()[1], -1))[ranks()[0]]


def gather(x):
    """The rows [B, e] of all processes. A gradient flows into one's own alone, so that the sum of
    all processes' gradients is that of one process with the whole batch."""
    rank, processes = ranks()
    if processes == 1:
        return x
    rows = [torch.empty_like(x) for _ in range(processes)]
    dist.all_gather(rows, x.detach().contiguous())
    rows[rank] = x
    return torch.cat(rows)


def sum_over_processes(tensors):
    """Sums each tensor over the processes, in place."""
    if ranks()[1] > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view_as(x))


# ----------------------------------------------------------------------------------------------
# 8. Stage 1: the mapper learns


def random_inputs(cfg, generator, rng, draw_z=None):
    """draw_w: n -> w [n, w_dim], and noise_of: step -> the rng of synthesis, None for fixed noise.

    Latents are drawn on the CPU, so that a seed means the same people on every device.
    """
    device = generator.w_avg.device
    draw_z = draw_z or (lambda n: torch.randn(n, generator.z_dim, generator=rng))
    seed = int(torch.randint(2**31, (), generator=rng))
    rank, processes = ranks()

    def noise_of(step):
        if cfg.noise == "fresh":
            return torch.Generator(device).manual_seed(seed + step * processes + rank)

    return torch.no_grad()(lambda n: generator.mapping(own(draw_z(n)).to(device))), noise_of


def log_step(bar, history, stage, step, loss, parameters, **more):
    """Sums the gradient over the processes and adds a row of numbers to the history.

    Raises FloatingPointError if loss or gradient are not finite: before any weight has changed.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sum_over_processes(gradients)
    grad_norm = nn.utils.get_total_norm(gradients)
    row = {"stage": stage, "step": step, "loss": loss, **more, "grad_norm": grad_norm}
    tensors = {name: x.detach() for name, x in row.items() if torch.is_tensor(x)}
    row |= zip(tensors, torch.stack([*tensors.values()]).tolist(), strict=True)  # waits once
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            wanted = f"a smaller rate ({'--lr-mapper' if stage == 1 else '--lr'})"
            if (stage, step) == (2, 0):
                wanted = "--eps 0.1, for images that do not differ yet"
            what = f"stage {stage}, step {step}: {name} is {row[name]}"
            raise FloatingPointError(f"{what}; wanted: {wanted}")
    history.append(row)
    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)


@torch.no_grad()
def retrieval_accuracy(image_features, text_features):
    """The share of images [B, e] whose own text [B, e] is the nearest; by chance, 1 / B."""
    similarity = F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T
    places = torch.arange(len(similarity), device=similarity.device)
    return (similarity.argmax(dim=1) == places).float().mean()


def train_mapper(
    cfg, generator, clip_model, transform, *, rng, mapper=None, draw_z=None, keep=None
):
    """Stage 1 -> the mapper of one CLIP, and a history with a dict of numbers for each step.

    With several CLIPs, call it for each. Their mappers share nothing, and Adam does not see the
    scale of a loss: the weighted sum of the losses would train each mapper as its own loss does.

    clip_model and generator are frozen. rng: a torch.Generator on the CPU, the only source of
    randomness. mapper: where to start, else a new one. draw_z: n -> z [n, z_dim], else normal.
    keep: (stage, bar, history, rng, *modules) -> the steps to do, one by one, to look at what is
    trained between them, or to go on where a run was stopped: cli.run_folder.Keeper. Raises
    FloatingPointError when loss or gradient stop being finite.
    """
    if mapper is None:
        ctx_dim = clip_model.token_embedding.embedding_dim
        mapper = LatentMapper(generator.w_dim, cfg.n_ctx, ctx_dim, rng).to(generator.w_avg.device)
    draw_w, noise_of = random_inputs(cfg, generator, rng, draw_z)
    E_I = image_encoder(clip_model, transform, cfg)
    logit_scale = clip_model.logit_scale.exp()
    label_source, label_target = (label_features(clip_model, x) for x in (cfg.source, cfg.target))
    features_of = prompt_features(cfg, clip_model, mapper, stage=1)

    optimizer = torch.optim.Adam(mapper.parameters(), lr=cfg.lr_mapper, fused=True)
    history, bar = [], trange(cfg.steps_mapper, desc="stage 1", disable=ranks()[0] > 0 or None)
    for step in keep(1, bar, history, rng, mapper, optimizer) if keep else bar:
        w = draw_w(cfg.batch_mapper)
        with torch.no_grad():
            image_features = gather(E_I(synthesize(cfg, generator, w, noise_of(step))))
        t_source, t_target = (gather(features) for features in features_of(w))
        contrastive = contrastive_loss(image_features, t_source, logit_scale)
        domain = domain_loss(t_target, label_target)
        domain_source = domain_loss(t_source, label_source)
        loss = contrastive + cfg.lambda_domain * (domain + cfg.lambda_source * domain_source)

        optimizer.zero_grad()
        loss.backward()
        parts = {"contrastive": contrastive, "domain": domain, "domain_source": domain_source}
        accuracy = retrieval_accuracy(image_features, t_source)
        log_step(bar, history, 1, step, loss, mapper.parameters(), **parts, accuracy=accuracy)
        optimizer.step()
    return mapper, history


# ----------------------------------------------------------------------------------------------
# 9. Stage 2: a copy of the generator learns


def prompt_directions(cfg, clip_model, mapper):
    """IPL: w -> delta_text [B, e], from each image's source prompt to its target prompt."""
    features_of = prompt_features(cfg, clip_model, mapper, stage=2)
    return torch.no_grad()(lambda w: feature_delta(*features_of(w)))


def label_direction(cfg, clip_model):
    """NADA: w -> delta_text [e], from one label to the other, the same for every w."""
    source, target = (label_features(clip_model, label) for label in (cfg.source, cfg.target))
    return lambda w: target - source


def random_windows(n, crop, rng):
    """n square windows that lose up to `crop` of the side: affine maps [n, 2, 3] of the grid."""
    scale = 1 - crop * torch.rand(n, 1, generator=rng)
    shift = (1 - scale) * (2 * torch.rand(n, 2, generator=rng) - 1)
    return torch.cat([torch.diag_embed(scale.expand(n, 2)), shift[:, :, None]], dim=2)


def crop_images(images, windows):
    """Each image [B, 3, R, R] through its window, at the same resolution; None: all of it."""
    if windows is None:
        return images
    grid = F.affine_grid(windows.to(images), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def adapt_generator(
    cfg, generator, clip_model, transform, directions, *, rng,
    more=(), target=None, layers=None, draw_z=None, keep=None,
):  # fmt: skip
    """Stage 2 -> the moving average of the adapted generator, and a history.

    directions: w -> delta_text, [B, e] or [e]; from prompt_directions, label_direction, or yours.
    more: further CLIPs, each (clip_model, transform, directions); the losses are summed, with
    cfg.clip_weights.
    target: what to train, in place; else a copy of the generator, which itself stays as it is.
    layers: its W modules that w inputs choose, else target.layers(). rng, draw_z, keep: as in
    stage 1; in each step the images' z is drawn before that of the layer choice. The average starts
    at `generator`. Raises FloatingPointError when loss or gradient stop being finite.
    """
    source, num_ws = generator, generator.num_ws
    target = copy.deepcopy(source) if target is None else target
    average = copy.deepcopy(source).requires_grad_(False)
    averaged, current = (
        [x for x in network.state_dict().values() if x.is_floating_point()]
        for network in (average, target)
    )
    draw_w, noise_of = random_inputs(cfg, source, rng, draw_z)
    clips = [(clip_model, transform, directions), *more]
    encoders = [image_encoder(model, transform, cfg) for model, transform, _ in clips]
    loss_of = summed(cfg, partial(directional_loss, eps=cfg.eps))

    def E_I(images):  # of all CLIPs: a list of [B, e]
        return [gather(encode(images)) for encode in encoders]

    k = cfg.num_layers or max(1, 2 * num_ws // 3)  # int(2 (2 log2(R) - 2) / 3) in the paper
    adaptive = cfg.layers == "adaptive" and k < num_ws
    texts = [encode_texts(model, cfg.target)[0] for model, *_ in clips]  # the bare label
    text_loss = summed(cfg, domain_loss)
    trainable = [  # W lists of parameters
        [p for name, p in layer.named_parameters() if not (cfg.freeze and cfg.freeze in name)]
        for layer in layers or target.layers()
    ]
    parameters = list(dict.fromkeys(p for group in trainable for p in group))
    # 4/5: StyleGAN2's correction for regularising in every fourth step only, kept by NADA and IPL
    betas = 0.0, 0.99 ** (4 / 5)
    optimizer = torch.optim.Adam(parameters, lr=cfg.lr * 4 / 5, betas=betas, fused=True)
    history, bar = [], trange(cfg.steps, desc="stage 2", disable=ranks()[0] > 0 or None)
    for step in keep(2, bar, history, rng, target, average, optimizer) if keep else bar:
        w, noise = draw_w(cfg.batch), noise_of(step)
        target.requires_grad_(False)
        chosen = history[-1]["layers"] if history else range(num_ws)
        if adaptive and step % cfg.layer_every == 0:
            codes = draw_w(cfg.layer_batch)
            with half_precision(cfg, w, "all"):
                chosen, _ = select_layers(
                    target, E_I, codes, texts, k, lr=cfg.layer_lr, rng=noise, loss=text_loss,
                    at_once=len(w),  # as many as are trained: the choice needs no more memory
                )  # fmt: skip
        for j in chosen:
            for p in trainable[j]:
                p.requires_grad_()

        windows = own(random_windows(cfg.batch, cfg.crop, rng)) if cfg.crop else None
        with torch.no_grad():
            delta_text = [gather(direct(w).expand(len(w), -1)) for *_, direct in clips]
            x_source = synthesize(cfg, source, w, noise)
            source_features = E_I(crop_images(x_source, windows))
        x_target = synthesize(cfg, target, w, noise)
        target_features = E_I(crop_images(x_target, windows))
        loss = loss_of(source_features, target_features, delta_text)

        optimizer.zero_grad()  # to None, so that Adam passes over the layers not chosen
        loss.backward()
        pairs = zip(source_features, target_features, strict=True)
        delta_image = torch.cat([feature_delta(*pair).norm(dim=-1) for pair in pairs]).mean()
        parts = {"delta_image": delta_image, "layers": sorted(chosen)}
        log_step(bar, history, 2, step, loss, parameters, **parts)
        optimizer.step()
        torch._foreach_lerp_(averaged, current, 1 - cfg.ema)
    target.requires_grad_(False)
    return average, history


# ----------------------------------------------------------------------------------------------
# 10. Sampling and saving


def sample_latents(n, z_dim, seed):
    """z [n, z_dim], row after row from one seed: sample i is the same for every n."""
    z = np.random.default_rng(seed).standard_normal((n, z_dim), dtype=np.float32)
    return torch.from_numpy(z)


@torch.no_grad()
def sample_grid(source, target, *, n=8, seed=0, truncation_psi=0.7, columns=8):
    """Source row over target row of the same w, with fixed noise: a picture, uint8 [H, W, 3]."""
    rows = []
    for z in sample_latents(n, source.z_dim, seed).to(source.w_avg.device).split(columns):
        w = truncate(source.mapping(z), source.w_avg, truncation_psi)
        for generator in (source, target):
            images = ((generator.synthesis(w) + 1) * 127.5).round().clamp(0, 255)
            row = torch.cat(list(images), dim=-1)  # [3, R, len(z) R]
            missing = (min(n, columns) - len(z)) * row.shape[-2]
            rows.append(F.pad(row, (0, missing), value=255))
    grid = torch.cat(rows, dim=-2).permute(1, 2, 0).to("cpu", torch.uint8)
    zoom = max(1, 128 // source.resolution)  # 64 pixels are small on a screen
    return grid.repeat_interleave(zoom, dim=0).repeat_interleave(zoom, dim=1)


# ----------------------------------------------------------------------------------------------
# 11. Command line


def load_frozen(cfg, device, path=None):
    """The run's source generator, or another one of its kind."""
    from checkpoints import load_generator

    if cfg.generator is None and path is None:
        from miniature import GENERATOR as path
    return load_generator(path or cfg.generator, device, cfg.class_index)


def load_clips(cfg, device):
    """The run's CLIPs and their transforms, if they can read the run's texts."""
    names = cfg.clip or ["ViT-B/32"]
    if not cfg.clip and cfg.generator is None:
        import miniature

        miniature.check_labels(cfg.source, cfg.target)
        names = [miniature.CLIP]
    clips = [load_clip(name, device) for name in names]
    for model, _ in clips:
        ctx = model.ln_final.weight.expand(1, cfg.n_ctx, -1)  # any vectors of that width
        for label in (cfg.source, cfg.target):
            construct_prompts(model, ctx, label)
            tokenize(model, [f"{cfg.ctx_init} {label}.", *(t.format(label) for t in TEMPLATES)])
    return clips


def prepare(cfg):
    """What can refuse a run, before it writes: -> its Keeper, its CLIPs, its generator."""
    from cli import checks, processes, run_folder

    checks.check(cfg)
    processes.choose_kernels(cfg.deterministic, cfg.tf32)
    device = processes.pick_device(cfg.device)
    checks.check_shares(cfg, ranks()[1])
    keep = run_folder.Keeper(run_folder.folder_of(cfg), asdict(cfg), device)
    with processes.one_at_a_time():
        clips, generator = load_clips(cfg, device), load_frozen(cfg, device)
    checks.check_layers(cfg, generator)
    return keep, clips, generator


def adapt(cfg):
    """The main job: from two words to a run folder. Results that are there stay until the end."""
    import miniature
    from cli import checks, processes

    keep, clips, generator = prepare(cfg)
    if keep.finished:
        return keep.say_finished()

    with processes.memory_advice(lambda: keep.sizes(generator.resolution)), keep:
        rng = torch.Generator().manual_seed(cfg.seed)
        history, mappers = [], []
        for i, pair in enumerate(clips):
            if cfg.method == "nada":
                directions = label_direction(cfg, pair[0])
            else:
                mapper, rows = train_mapper(cfg, generator, *pair, rng=rng, keep=keep)
                directions = prompt_directions(cfg, pair[0], mapper)
                mappers.append(mapper)
                history += rows if len(clips) == 1 else [{**x, "clip": cfg.clip[i]} for x in rows]
                checks.warn_of_chance(cfg, rows)
            clips[i] = *pair, directions
        first, *more = clips
        adapted, rows = adapt_generator(cfg, generator, *first, rng=rng, more=more, keep=keep)
        if ranks()[0] == 0:
            loss, psi = summed(cfg, partial(directional_loss, eps=cfg.eps)), cfg.truncation_psi
            floor = miniature.floor_of_truth(cfg, generator, clips, loss)
            grid = sample_grid(generator, adapted, n=cfg.samples, seed=cfg.seed, truncation_psi=psi)
            keep.finish(asdict(cfg), mappers, adapted, history + rows, floor, grid)


def main(argv=None):
    """The command line. Bad input ends in one line on stderr and exit code 2."""
    from cli import processes, run_folder
    from cli.convert import convert, inspect
    from cli.sample import sample

    argv = sys.argv[1:] if argv is None else argv
    about = (
        "Adapt a generator to a new domain, from words alone. Defaults: the miniature's or, with "
        "--generator, as published. Several --target: several runs. Also: sample, convert, inspect."
    )
    with processes.plain_words(speaks=processes.is_first()):
        if argv and not argv[0].startswith("-"):
            return processes.parse_command((sample, convert, inspect), argv)()
        default = Config() if any(x.startswith("--generator") for x in argv) else MINIATURE
        parse = partial(processes.parse, Config, description=about, default=default)
        runs = run_folder.spread([parse(words) for words in processes.split(argv, "--target")])
        for cfg in runs[1:]:  # none begins where a later one is refused
            prepare(cfg)
    processes.make_all(runs, adapt)


if __name__ == "__main__":
    main()
