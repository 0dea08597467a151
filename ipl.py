"""Image-specific prompt learning (IPL, CVPR 2023, arXiv 2304.03119) in one file.

A generator of one domain ("photo") learns another ("anime") from the two words and CLIP alone:
  1. a mapper F turns each latent w into m prompt vectors, P = F(w), one prompt per image;
  2. stage 1 trains F: "[P] photo" must match the image of w, and "[P] anime" must mean anime;
  3. the step from "[P] photo" to "[P] anime" in CLIP's text space is that image's direction;
  4. stage 2 trains a copy of the generator: its images must move that way in CLIP's image space;
  5. NADA, the baseline, is the same second stage with one direction for all images.

    z --G.mapping--> w --F--> P --[SOS] P label [EOT]--> E_T --> t_source, t_target
                     +--G_source.synthesis--> x_source --> E_I --+  stage 1: contrastive + domain
                     +--G_target.synthesis--> x_target --> E_I --+  stage 2: directional

Axes: B batch, m = n_ctx prompt vectors, d CLIP's text width, e CLIP's joint width, L tokens,
R resolution, W = num_ws the number of w inputs of the synthesis network.

  equation                                            function                    notebook
  P = F(w)                                            LatentMapper                01_mapper
  t = E_T([SOS] P label [EOT])                        encode_prompts              02_prompts
  L_contr = 1/2 [CE(s I T', diag) + CE(s T I', diag)] contrastive_loss            03_losses
  L_domain = mean[1 - cos(t_target, ensemble)]        domain_loss                 03_losses
  L_stage1 = L_contr + lambda L_domain                train_mapper                04_stage1
  L_stage2 = mean[1 - cos(delta_image, delta_text)]   directional_loss            05_stage2
  top k of mean |change of W+|                        select_layers               05_stage2
  G_target, its moving average                        adapt_generator             05_stage2

Usage
  python ipl.py --source photo --target anime                       the miniature world, on a CPU
  python ipl.py --generator ffhq.pt --clip ViT-B/32 --target "Disney"     a real StyleGAN2
  python ipl.py sample --run runs/photo-to-anime --n 16 --seed 1 --out grid.png
To copy it: this file needs torch, numpy and clip; train_mapper and adapt_generator take any
generator that satisfies the protocol of section 1.

Where this file departs from the published code (no. 1 and 3 are switches; 1 is off by default)
 1. Residual prompts. The published code adds the feature of a fixed hand-written text to that of
    the learned prompt: "a photo of a photo." in stage 1, but "a photo of a", without the label, in
    stage 2. `--residual published` does exactly this, `label` keeps the label in both stages,
    `none` adds nothing, as in the paper.
 2. Layer choice is off by one there: index j >= 2 of W+ feeds convolution j - 1 but frees j - 2,
    and index 1 frees a ToRGB layer. Here the layer freed is the layer fed.
 3. The directional loss divides by |delta_image|, which is 0/0 when both images are equal. The
    published code escapes, because each generator draws its own noise. `--eps` > 0 makes the loss
    smooth, |x| -> sqrt(|x|^2 + eps^2), and so allows `--noise fixed`; eps = 0 is the published loss.
 4. Images are resized for CLIP with antialiasing; torchvision 0.9, as used there, had none.
 5. CLIP runs in float32, there in float16 without loss scaling. `--autocast` runs its image
    encoder in bfloat16.
 6. n_ctx is a number of prompt vectors; there it is the number of words of ctx_init.
 7. The truncation centre is the file's own average; there it is drawn anew for each run.
 8. Work that changes no number is left out: fixed texts are encoded once, prompts are not padded
    to 77 tokens, CLIP collects no gradients, the layer choice computes none for the weights.
 9. Ours alone, off by default: `--crop`, `--freeze`, `--layers all`.
"""

import contextlib
import copy
import json
import math
import re
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

with warnings.catch_warnings():  # clip imports pkg_resources, which warns that it is old
    warnings.simplefilter("ignore")
    import clip

# --------------------------------------------------------------------------------------------
# 0. Configuration: the defaults are the published ones


@dataclass(frozen=True)
class Config:
    # What the generator draws now, in words.
    source: str = "photo"
    # What it shall draw, in words.
    target: str = "anime"
    # StyleGAN2 checkpoint of the source domain. None: the miniature world with its own settings.
    generator: str | None = None
    # CLIP: a name of clip.available_models() or a file. None: the miniature's, or ViT-B/32.
    clip: str | None = None
    # Image-specific prompts, or one fixed direction for all images (NADA, which has no stage 1).
    method: Literal["ipl", "nada"] = "ipl"
    # Run folder. None: runs/<source>-to-<target>, with "-nada" added for that method.
    out: str | None = None
    # Replace a finished run.
    overwrite: bool = False
    # Seeds the mapper, the latents, the noise and the samples.
    seed: int = 0
    # auto, cpu, cuda or cuda:<n>. Latents are drawn on the CPU, the same for every device.
    device: str = "auto"

    # Number of learned prompt vectors per image.
    n_ctx: int = 4
    # The hand-written prompt that residual prompts are added to.
    ctx_init: str = "a photo of a"
    # Added to the learned prompts' features: deviation 1 of the docstring.
    residual: Literal["published", "label", "none"] = "published"
    # Weight of the domain loss in stage 1.
    lambda_domain: float = 1.0
    # Within it, weight of the source label against the target label.
    lambda_source: float = 0.0
    # Stage 1: learning rate of Adam, images per step, steps.
    lr_mapper: float = 0.05
    batch_mapper: int = 32
    steps_mapper: int = 300

    # Stage 2: learning rate (times 4/5 in Adam, as in StyleGAN2's training), images per step, steps.
    lr: float = 0.002
    batch: int = 2
    steps: int = 300
    # Decay of the moving average of the generator, which is what is saved.
    ema: float = 0.99
    # Smooths |delta_image| in the directional loss: deviation 3.
    eps: float = 0.0
    # Synthesis noise in training: drawn afresh for each generator, or its fixed buffers.
    noise: Literal["fresh", "fixed"] = "fresh"
    # The same random crop of source and target image before CLIP, up to this part of the side.
    crop: float = 0.0
    # Layers trained per step: the adaptive choice, or all of them.
    layers: Literal["adaptive", "all"] = "adaptive"
    # How many the adaptive choice takes. None: two thirds of the number of w inputs.
    num_layers: int | None = None
    # Latents and step size of the adaptive choice.
    layer_batch: int = 8
    layer_lr: float = 0.01
    # Parameters of the trained layers with this in their name stay as they are, e.g. "noise".
    freeze: str = ""
    # CLIP's image encoder in bfloat16: faster where the hardware has it.
    autocast: bool = False

    # Truncation of the samples.
    truncation_psi: float = 0.7
    # Number of samples in the picture.
    samples: int = 8


# The miniature world's networks learn at other rates than FFHQ's, have no noise to speak of and
# 4 to 64 pixels to change. `python ipl.py` without --generator starts from these.
MINIATURE = Config(
    batch_mapper=32,
    steps_mapper=100,
    lr=0.0016 * 5 / 4,
    batch=4,
    steps=150,
    eps=0.1,
    noise="fixed",
    crop=0.15,
    layers="all",
    freeze="noise",
    truncation_psi=1.0,
)

# --------------------------------------------------------------------------------------------
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

        rng: None for the fixed noise, a torch.Generator for fresh noise drawn from it.
        """

    def layers(self):
        """W modules, those that may be trained; layers()[j] is what w index j feeds."""


def truncate(w, w_avg, psi):
    """Draws w towards the average latent: fewer oddities, less variety."""
    return w_avg + psi * (w - w_avg)


# --------------------------------------------------------------------------------------------
# 2. CLIP: loading, its image transform, its two encoders

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_clip(name_or_path, device="cpu"):
    """A CLIP, frozen and in float32, and its transform of images.

    A name goes to clip.load, which downloads it once. A file is read here, as tensors only:
    clip.load of openai/CLIP cannot read a plain state dict.
    """
    name_or_path = str(name_or_path)
    if name_or_path in clip.available_models():
        clip_model = clip.load(name_or_path, device="cpu", jit=False)[0]
    elif not Path(name_or_path).is_file():
        raise ValueError(
            f"CLIP {name_or_path!r} is neither a file nor one of {', '.join(clip.available_models())}"
        )
    else:
        try:
            state_dict = torch.load(name_or_path, map_location="cpu", weights_only=True)
            clip_model = clip.model.build_model(state_dict)
        except Exception as error:
            raise ValueError(
                f"{name_or_path} is not a CLIP state dict; wanted: a file of tensors with OpenAI's "
                "key names (not a TorchScript archive: for OpenAI's own files give the model's name)"
            ) from error
    clip_model = clip_model.float().requires_grad_(False).eval().to(device)
    resolution = clip_model.visual.input_resolution
    return clip_model, lambda images: clip_transform(images, resolution)


def clip_transform(images, resolution):
    """CLIP's preprocessing on tensors: images in [-1, 1], [B, 3, H, W] -> [B, 3, r, r].

    Differentiable, and without a clamp: an image outside [-1, 1] keeps its gradient.
    """
    x = (images + 1) / 2
    height, width = x.shape[-2:]
    if min(height, width) != resolution:
        scale = resolution / min(height, width)
        size = [int(height * scale + 1e-6), int(width * scale + 1e-6)]
        x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
    top, left = (round((side - resolution) / 2) for side in x.shape[-2:])
    x = x[..., top : top + resolution, left : left + resolution]
    return (x - x.new_tensor(CLIP_MEAN)[:, None, None]) / x.new_tensor(CLIP_STD)[:, None, None]


def image_encoder(clip_model, transform, autocast=False):
    """E_I: images in [-1, 1], [B, 3, R, R] -> features [B, e], not normalised."""

    def encode_images(images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            return clip_model.encode_image(transform(images)).float()

    return encode_images


def encode_embeddings(clip_model, x, eot):
    """CLIP's text encoder from the token embeddings on: x [N, L, d], eot [N] -> [N, e].

    clip_model.encode_text, but for any L: attention is causal, so that what stands behind EOT
    cannot change the feature there, and padding to 77 tokens would only cost time.
    """
    L = x.shape[1]
    x = x + clip_model.positional_embedding[:L]
    causal_mask = torch.full((L, L), -math.inf, device=x.device).triu(1)
    x = x.transpose(0, 1)  # [L, N, d], as CLIP's blocks want it
    for block in clip_model.transformer.resblocks:  # not called whole: their mask is for L = 77
        h = block.ln_1(x)
        x = x + block.attn(h, h, h, need_weights=False, attn_mask=causal_mask)[0]
        x = x + block.mlp(block.ln_2(x))
    x = clip_model.ln_final(x)[eot, torch.arange(x.shape[1], device=x.device)]  # [N, d]
    return x @ clip_model.text_projection


def tokenize(clip_model, texts):
    """Tokens [N, L], cut to the longest text, and the position [N] of each EOT."""
    try:
        tokens = clip.tokenize(texts, context_length=clip_model.context_length).long()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    tokens = tokens.to(clip_model.positional_embedding.device)
    eot = tokens.argmax(dim=-1)  # EOT is the highest of all tokens
    return tokens[:, : int(eot.max()) + 1], eot


def encode_texts(clip_model, texts):
    """E_T of whole texts: N strings -> [N, e]; equals clip_model.encode_text."""
    tokens, eot = tokenize(clip_model, texts)
    return encode_embeddings(clip_model, clip_model.token_embedding(tokens), eot)


# --------------------------------------------------------------------------------------------
# 3. The latent mapper


class LatentMapper(nn.Module):
    """F: w -> P, one prompt per image; shaped like StyleGAN's mapping network.

    Pixel norm, then four linear layers with equalised learning rate (multiplier 0.01), each
    followed by leaky ReLU of slope 0.2 and gain sqrt(2) - the last one too, as published.
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


# --------------------------------------------------------------------------------------------
# 4. Prompts

# The ImageNet templates of OpenAI's CLIP notebook (MIT), without "a photo of many {}.": the
# published list has 79.
TEMPLATES = """
    a bad photo of a {}. | a sculpture of a {}. | a photo of the hard to see {}. |
    a low resolution photo of the {}. | a rendering of a {}. | graffiti of a {}. |
    a bad photo of the {}. | a cropped photo of the {}. | a tattoo of a {}. | the embroidered {}. |
    a photo of a hard to see {}. | a bright photo of a {}. | a photo of a clean {}. |
    a photo of a dirty {}. | a dark photo of the {}. | a drawing of a {}. | a photo of my {}. |
    the plastic {}. | a photo of the cool {}. | a close-up photo of a {}. |
    a black and white photo of the {}. | a painting of the {}. | a painting of a {}. |
    a pixelated photo of the {}. | a sculpture of the {}. | a bright photo of the {}. |
    a cropped photo of a {}. | a plastic {}. | a photo of the dirty {}. |
    a jpeg corrupted photo of a {}. | a blurry photo of the {}. | a photo of the {}. |
    a good photo of the {}. | a rendering of the {}. | a {} in a video game. | a photo of one {}. |
    a doodle of a {}. | a close-up photo of the {}. | a photo of a {}. | the origami {}. |
    the {} in a video game. | a sketch of a {}. | a doodle of the {}. | a origami {}. |
    a low resolution photo of a {}. | the toy {}. | a rendition of the {}. |
    a photo of the clean {}. | a photo of a large {}. | a rendition of a {}. |
    a photo of a nice {}. | a photo of a weird {}. | a blurry photo of a {}. | a cartoon {}. |
    art of a {}. | a sketch of the {}. | a embroidered {}. | a pixelated photo of a {}. |
    itap of the {}. | a jpeg corrupted photo of the {}. | a good photo of a {}. | a plushie {}. |
    a photo of the nice {}. | a photo of the small {}. | a photo of the weird {}. |
    the cartoon {}. | art of the {}. | a drawing of the {}. | a photo of the large {}. |
    a black and white photo of a {}. | the plushie {}. | a dark photo of a {}. | itap of a {}. |
    graffiti of the {}. | a toy {}. | itap of my {}. | a photo of a cool {}. |
    a photo of a small {}. | a tattoo of the {}.
"""
TEMPLATES = tuple(" ".join(TEMPLATES.split()).split(" | "))


def construct_prompts(clip_model, ctx, label):
    """[SOS] ctx label [EOT] as token embeddings: ctx [B, n_ctx, d] -> [B, L, d]."""
    B, n_ctx, d = ctx.shape
    tokens, _ = tokenize(clip_model, label)  # [1, L - n_ctx]
    if tokens.shape[1] + n_ctx > clip_model.context_length:
        raise ValueError(
            f"a prompt of {n_ctx} vectors and {label!r} has {tokens.shape[1] + n_ctx} tokens; "
            f"this CLIP reads {clip_model.context_length}"
        )
    text = clip_model.token_embedding(tokens).expand(B, -1, -1)
    return torch.cat(
        [
            text[:, :1],  # [SOS]       [B, 1, d]
            ctx,  #                     [B, n_ctx, d]
            text[:, 1:],  # label [EOT] [B, L - n_ctx - 1, d]
        ],
        dim=1,
    )


def encode_prompts(clip_model, ctx, label):
    """t = E_T([SOS] ctx label [EOT]): ctx [B, n_ctx, d] -> [B, e], not normalised."""
    prompts = construct_prompts(clip_model, ctx, label)
    B, L, _ = prompts.shape
    return encode_embeddings(clip_model, prompts, prompts.new_full((B,), L - 1, dtype=torch.long))


def label_features(clip_model, label, templates=TEMPLATES):
    """The label in many sentences: the mean [e] of the normalised features."""
    texts = [template.format(label) for template in templates]
    return F.normalize(encode_texts(clip_model, texts), dim=-1).mean(dim=0)


def residual_features(cfg, clip_model, stage):
    """What is added to the features of the source and of the target prompts, [2, e]."""
    if cfg.residual == "none":
        return torch.zeros(2, clip_model.text_projection.shape[1]).to(clip_model.text_projection)
    if cfg.residual == "published" and stage == 2:  # the label is lost there
        return encode_texts(clip_model, [cfg.ctx_init, cfg.ctx_init])
    return encode_texts(clip_model, [f"{cfg.ctx_init} {y}." for y in (cfg.source, cfg.target)])


# --------------------------------------------------------------------------------------------
# 5. Losses: one function per equation; features of any scale, [B, e] unless said otherwise


def feature_delta(source_features, target_features):
    """norm(target) - norm(source): the way from source to target on CLIP's sphere."""
    return F.normalize(target_features, dim=-1) - F.normalize(source_features, dim=-1)


def contrastive_loss(image_features, text_features, logit_scale):
    """L_contr: in a batch, each image matches its own prompt and no other, and vice versa.

    A prompt shared by all images makes the image-to-text half exactly log B: nothing but an
    image-specific prompt can lower it.
    """
    image_features = F.normalize(image_features, dim=-1)
    text_features = F.normalize(text_features, dim=-1)
    logits = logit_scale * image_features @ text_features.T  # [B, B]
    match = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2


def domain_loss(text_features, label_feature):
    """L_domain: every prompt still means its label; label_feature [e] from label_features."""
    return (1 - F.cosine_similarity(text_features, label_feature, dim=-1)).mean()


def directional_loss(source_image_features, target_image_features, text_direction, eps=0.0):
    """L_stage2: mean of 1 - cos(delta_image, delta_text); text_direction [B, e] or [e].

    eps > 0 divides by sqrt(|delta_image|^2 + eps^2) instead of |delta_image|. Where both images
    are equal, as at the first step with fixed noise, the published 0/0 becomes a loss of 1 with a
    finite gradient; and near there, no gradient a million times that of the next step can fill
    Adam's memory and stop it.
    """
    delta_image = feature_delta(source_image_features, target_image_features)  # [B, e]
    delta_text = F.normalize(text_direction, dim=-1)
    length = (delta_image.square().sum(dim=-1) + eps**2).sqrt()  # [B]
    return (1 - (delta_image * delta_text).sum(dim=-1) / length).mean()


# --------------------------------------------------------------------------------------------
# 6. Text directions and layer choice: what stage 2 moves along, and what it moves


def prompt_directions(cfg, clip_model, mapper):
    """IPL: w -> delta_text [B, e], from each image's own source prompt to its target prompt."""
    residual_source, residual_target = residual_features(cfg, clip_model, stage=2)

    @torch.no_grad()
    def directions(w):
        ctx = mapper(w)
        return feature_delta(
            encode_prompts(clip_model, ctx, cfg.source) + residual_source,
            encode_prompts(clip_model, ctx, cfg.target) + residual_target,
        )

    return directions


def label_direction(cfg, clip_model):
    """NADA: w -> delta_text [e], the way between the two labels, the same for every w."""
    source, target = (label_features(clip_model, label) for label in (cfg.source, cfg.target))
    return lambda w: target - source


def select_layers(target, encode_images, w, text_feature, k, *, lr=0.01, rng=None):
    """The k w inputs that matter most for the target label: their indices, and all weights [W].

    One SGD step on the W+ codes of some images, towards the label; an input that it moves far is
    one whose layer can bring the label. A step of SGD is -lr * gradient, so none is taken. Only
    W+ gets a gradient, no weight of the generator.
    """
    w_plus = w[:, None].repeat(1, target.num_ws, 1).requires_grad_()  # [B, W, w_dim]
    features = encode_images(target.synthesis(w_plus, rng=rng))
    (grad,) = torch.autograd.grad(domain_loss(features, text_feature), w_plus)
    weights = (lr * grad).abs().mean(dim=(0, 2))  # [W]
    return weights.topk(k).indices.tolist(), weights


# --------------------------------------------------------------------------------------------
# 7. Stage 1: the mapper learns, CLIP and the generator are frozen


def normal_latents(z_dim, rng):
    """n -> z [n, z_dim], drawn on the CPU: a seed means the same on every device."""
    return lambda n: torch.randn(n, z_dim, generator=rng)


def noise_rng(cfg, rng, device):
    """What synthesis gets as rng: None, or a generator on its device, seeded from ours."""
    if cfg.noise == "fixed":
        return None
    return torch.Generator(device).manual_seed(int(torch.randint(2**31, (), generator=rng)))


def progress(steps, name):
    """A bar on a terminal, nothing elsewhere, a plain range without tqdm."""
    try:
        from tqdm import trange
    except ImportError:
        return range(steps)
    return trange(steps, desc=name, disable=None)


def log_step(bar, history, record, every=10):
    """Appends the step's numbers, still on the device; looks at them only every ten steps."""
    record = {name: x.detach() if torch.is_tensor(x) else x for name, x in record.items()}
    history.append(record)
    if len(history) % every == 1:
        shown = {name: float(x) for name, x in record.items() if torch.is_tensor(x)}
        if not math.isfinite(shown["loss"]):
            raise FloatingPointError(
                f"the loss of stage {record['stage']} is {shown['loss']} at step {record['step']}; "
                "a lower learning rate may help, or --eps 0.1 where images can be equal"
            )
        if not getattr(bar, "disable", True):
            bar.set_postfix({name: f"{x:.3f}" for name, x in shown.items()})


def to_floats(history):
    """The tensors of a history as numbers, one transfer for each name."""
    for name in [name for name, x in history[0].items() if torch.is_tensor(x)]:
        column = torch.stack([record[name] for record in history]).tolist()
        for record, x in zip(history, column, strict=True):
            record[name] = x
    return history


def train_mapper(cfg, generator, clip_model, transform, *, rng, mapper=None, draw_z=None):
    """Stage 1 -> mapper, history: one dict of numbers per step.

    rng: a CPU torch.Generator, the only source of randomness. mapper: where to start from, else
    a new one. draw_z: n -> z [n, z_dim], else normal latents from rng.
    """
    device = generator.w_avg.device
    encode_images = image_encoder(clip_model, transform, cfg.autocast)
    if mapper is None:
        ctx_dim = clip_model.token_embedding.embedding_dim
        mapper = LatentMapper(generator.w_dim, cfg.n_ctx, ctx_dim, rng).to(device)
    draw_z = draw_z or normal_latents(generator.z_dim, rng)
    noise = noise_rng(cfg, rng, device)

    logit_scale = clip_model.logit_scale.exp()
    label_source = label_features(clip_model, cfg.source)
    label_target = label_features(clip_model, cfg.target)
    residual_source, residual_target = residual_features(cfg, clip_model, stage=1)

    optimizer = torch.optim.Adam(mapper.parameters(), lr=cfg.lr_mapper)
    history = []
    for step in (bar := progress(cfg.steps_mapper, "stage 1")):
        with torch.no_grad():
            w = generator.mapping(draw_z(cfg.batch_mapper).to(device))
            image_features = encode_images(generator.synthesis(w, rng=noise))
        ctx = mapper(w)  # [B, n_ctx, d]
        t_source = encode_prompts(clip_model, ctx, cfg.source) + residual_source
        t_target = encode_prompts(clip_model, ctx, cfg.target) + residual_target

        contrastive = contrastive_loss(image_features, t_source, logit_scale)
        domain_target = domain_loss(t_target, label_target)
        domain_source = domain_loss(t_source, label_source)
        domain = domain_target + cfg.lambda_source * domain_source
        loss = contrastive + cfg.lambda_domain * domain

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record = {
            "stage": 1,
            "step": step,
            "loss": loss,
            "contrastive": contrastive,
            "domain_target": domain_target,
            "domain_source": domain_source,
            "grad_norm": nn.utils.get_total_norm([p.grad for p in mapper.parameters()]),
        }
        log_step(bar, history, record)
    return mapper.requires_grad_(False), to_floats(history)


# --------------------------------------------------------------------------------------------
# 8. Stage 2: a copy of the generator learns, everything else is frozen


def random_windows(n, crop, rng):
    """n square windows that lose up to `crop` of the side, as a sampling grid's affine maps."""
    if not crop:
        return None
    scale = 1 - crop * torch.rand(n, 1, generator=rng)
    shift = (1 - scale) * (2 * torch.rand(n, 2, generator=rng) - 1)
    return torch.cat([torch.diag_embed(scale.expand(n, 2)), shift[:, :, None]], dim=2)  # [n, 2, 3]


def crop_images(images, windows):
    """Each image [B, 3, R, R] seen through its window, at the same resolution."""
    if windows is None:
        return images
    grid = F.affine_grid(windows.to(images), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def adapt_generator(
    cfg, generator, clip_model, transform, directions, *, rng, target=None, layers=None, draw_z=None
):
    """Stage 2 -> the moving average of the adapted generator, history.

    directions: w -> delta_text, [B, e] or [e], from prompt_directions, label_direction or
    anywhere else. target: the generator to train, else a copy of `generator`. layers: its W
    modules that w inputs select, else target.layers(). rng, draw_z: as in train_mapper; z for the
    images is drawn before z for the layer choice.
    """
    source, device = generator, generator.w_avg.device
    encode_images = image_encoder(clip_model, transform, cfg.autocast)
    target = copy.deepcopy(source) if target is None else target
    average = copy.deepcopy(source).requires_grad_(False)
    layers = target.layers() if layers is None else layers
    draw_z = draw_z or normal_latents(source.z_dim, rng)
    noise = noise_rng(cfg, rng, device)
    k = cfg.num_layers or max(1, 2 * target.num_ws // 3)  # int(2 (2 log2(R) - 2) / 3)
    adaptive = cfg.layers == "adaptive" and k < target.num_ws
    text_feature = encode_texts(clip_model, cfg.target)[0]  # the bare label, for the layer choice

    trainable = [  # per w input
        [p for name, p in layer.named_parameters() if not (cfg.freeze and cfg.freeze in name)]
        for layer in layers
    ]
    # StyleGAN2's rates: 4/5 of Adam's, from its regularisation every fourth step (NADA's choice)
    ratio = 4 / 5
    parameters = list(dict.fromkeys(p for group in trainable for p in group))
    optimizer = torch.optim.Adam(parameters, lr=cfg.lr * ratio, betas=(0.0, 0.99**ratio))
    averaged = [
        pair
        for pair in zip(average.state_dict().values(), target.state_dict().values(), strict=True)
        if pair[0].is_floating_point()
    ]

    history = []
    for step in (bar := progress(cfg.steps, "stage 2")):
        z = draw_z(cfg.batch)
        target.requires_grad_(False)
        chosen = list(range(target.num_ws))
        if adaptive:
            w = source.mapping(draw_z(cfg.layer_batch).to(device))
            chosen, _ = select_layers(
                target, encode_images, w, text_feature, k, lr=cfg.layer_lr, rng=noise
            )
        for j in chosen:
            for p in trainable[j]:
                p.requires_grad_()

        windows = random_windows(cfg.batch, cfg.crop, rng)
        with torch.no_grad():
            w = source.mapping(z.to(device))
            x_source = source.synthesis(w, rng=noise)
            source_features = encode_images(crop_images(x_source, windows))
            delta_text = directions(w)
        x_target = target.synthesis(w, rng=noise)
        target_features = encode_images(crop_images(x_target, windows))
        loss = directional_loss(source_features, target_features, delta_text, cfg.eps)

        optimizer.zero_grad()  # to None: Adam passes over the layers that were not chosen
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(*zip(*averaged, strict=True), 1 - cfg.ema)
            record = {
                "stage": 2,
                "step": step,
                "loss": loss,
                "grad_norm": nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]),
                "delta_image": feature_delta(source_features, target_features).norm(dim=-1).mean(),
                "layers": sorted(chosen),
            }
        log_step(bar, history, record)
    return average, to_floats(history)


# --------------------------------------------------------------------------------------------
# 9. Sampling and saving


def sample_latents(n, z_dim, seed):
    """z [n, z_dim], row by row from one seed: sample i is the same whatever n is."""
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(z_dim, generator=rng) for _ in range(n)])


@torch.no_grad()
def sample_grid(source, target, *, n=8, seed=0, truncation_psi=0.7, columns=8):
    """Source row over target row of the same w: uint8 [H, W, 3], `columns` pairs to a row.

    Noise is the generators' fixed noise, so that a seed is a picture.
    """
    w_avg = source.w_avg
    rows = []
    for z in sample_latents(n, source.z_dim, seed).to(w_avg.device).split(columns):
        w = truncate(source.mapping(z), w_avg, truncation_psi)
        for generator in (source, target):
            images = ((generator.synthesis(w) + 1) * 127.5).round().clamp(0, 255)  # [b, 3, R, R]
            row = torch.cat(list(images), dim=-1)  # [3, R, b R]
            rows.append(F.pad(row, (0, images.shape[-1] * min(n, columns) - row.shape[-1]), value=255))
    grid = torch.cat(rows, dim=-2).permute(1, 2, 0).to("cpu", torch.uint8)
    zoom = max(1, 128 // source.resolution)  # portraits of 64 pixels are small on today's screens
    return grid.repeat_interleave(zoom, dim=0).repeat_interleave(zoom, dim=1)


def write_whole(path, write):
    """Calls write on a file aside, then renames it: the file appears whole or not at all."""
    aside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def save_picture(grid, path):
    from PIL import Image

    write_whole(path, Image.fromarray(grid.numpy()).save)


def save_curves(history, path):
    """One panel for each stage and quantity."""
    from matplotlib.figure import Figure

    losses = ["loss", "contrastive", "domain_target", "domain_source"]
    panels = [(1, losses), (1, ["grad_norm"]), (2, ["loss"]), (2, ["grad_norm"]), (2, ["delta_image"])]
    stages = {record["stage"] for record in history}
    panels = [(stage, names) for stage, names in panels if stage in stages]
    figure = Figure(figsize=(3.5 * len(panels), 3), layout="constrained")
    for axes, (stage, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            axes.plot([r[name] for r in history if r["stage"] == stage], label=name)
        axes.set(title=f"stage {stage}", xlabel="step")
        axes.legend()
    write_whole(path, figure.savefig)


# --------------------------------------------------------------------------------------------
# 10. Command line

RUN_FILES = (
    "config.json", "mapper.safetensors", "generator.pt", "history.jsonl", "curves.png", "samples.png",
)  # fmt: skip


def check(cfg):
    """Every value in its range, else a ValueError of one line."""
    counts = "n_ctx batch_mapper steps_mapper batch steps num_layers layer_batch samples"
    for names, holds, wanted in (
        (counts, lambda x: x >= 1, "at least 1"),
        ("lr_mapper lr layer_lr", lambda x: 0 < x < math.inf, "above 0"),
        ("lambda_domain lambda_source eps", lambda x: 0 <= x < math.inf, "0 or more"),
        ("seed", lambda x: 0 <= x < 2**63, "0 or more, below 2^63"),
        ("ema crop", lambda x: 0 <= x < 1, "0 or more, below 1"),
        ("truncation_psi", math.isfinite, "a finite number"),
    ):
        for name in names.split():
            value = getattr(cfg, name)
            if value is not None and not holds(value):
                raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
    for name in ("source", "target"):
        if not getattr(cfg, name).strip():
            raise ValueError(f"--{name} is empty; wanted: a domain in words, e.g. 'anime'")
    if cfg.source.split() == cfg.target.split():
        raise ValueError(f"--source and --target are both {cfg.target!r}: there is no way to go")
    if cfg.noise == "fixed" and cfg.eps == 0:
        raise ValueError(
            "--noise fixed makes both generators start with equal images, where --eps 0 divides "
            "0 by 0; wanted: --eps 0.1, or --noise fresh"
        )


def pick_device(name):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} is not there; wanted: auto, cpu, cuda, cuda:0 ...") from error


def run_folder(cfg):
    """Where the run goes; refuses a finished one."""
    source, target = (re.sub(r"\W+", "-", y.lower()).strip("-") for y in (cfg.source, cfg.target))
    name = f"{source}-to-{target}" + ("-nada" if cfg.method == "nada" else "")
    out = Path(cfg.out) if cfg.out is not None else Path("runs") / name
    if (out / "generator.pt").exists() and not cfg.overwrite:
        raise ValueError(f"{out} is a finished run; wanted: another --out, or --overwrite")
    return out


def make_writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}); wanted: another --out") from error


def load_source(cfg):
    """The frozen source generator; the miniature's where none is named."""
    from stylegan2_ops import load_generator

    path = cfg.generator
    if path is None:
        import miniature

        path = miniature.GENERATOR
    if not Path(path).is_file():
        raise ValueError(f"no generator at {path}; wanted: a StyleGAN2 checkpoint file")
    return load_generator(path, pick_device(cfg.device)).requires_grad_(False).eval()


def load_text_and_image_encoder(cfg):
    """load_clip, and every text of the run checked against what that CLIP can read."""
    name = cfg.clip or "ViT-B/32"
    if cfg.clip is None and cfg.generator is None:
        import miniature

        name = miniature.CLIP
        for label in (cfg.source, cfg.target):
            if unknown := miniature.unknown_words(label):
                raise ValueError(
                    f"the miniature's CLIP has never read {', '.join(map(repr, unknown))}; it knows "
                    f"{', '.join(miniature.LABELS)}; for other words: --generator FILE --clip ViT-B/32"
                )
    clip_model, transform = load_clip(name, pick_device(cfg.device))
    ctx = torch.zeros(1, cfg.n_ctx, clip_model.token_embedding.embedding_dim)
    for label in (cfg.source, cfg.target):
        construct_prompts(clip_model, ctx.to(clip_model.positional_embedding), label)
        tokenize(clip_model, [*(t.format(label) for t in TEMPLATES), f"{cfg.ctx_init} {label}."])
    return clip_model, transform


@contextlib.contextmanager
def one_line_errors():
    """Bad input: one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"ipl.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def adapt(cfg):
    """The main job: a run folder from two words."""
    with one_line_errors():
        check(cfg)
        out = run_folder(cfg)
        generator = load_source(cfg)
        clip_model, transform = load_text_and_image_encoder(cfg)
        make_writable(out)
    from safetensors.torch import save_file
    from stylegan2_ops import save_generator

    for name in RUN_FILES:  # of a run that is to be replaced
        (out / name).unlink(missing_ok=True)
    write_whole(out / "config.json", lambda f: f.write_text(json.dumps(asdict(cfg), indent=2) + "\n"))
    rng = torch.Generator().manual_seed(cfg.seed)
    history, seconds = [], []
    start = time.perf_counter()
    if cfg.method == "ipl":
        mapper, history = train_mapper(cfg, generator, clip_model, transform, rng=rng)
        write_whole(out / "mapper.safetensors", lambda f: save_file(mapper.state_dict(), f))
        directions = prompt_directions(cfg, clip_model, mapper)
        seconds.append(f"stage 1 {time.perf_counter() - start:.0f} s")
    else:
        directions = label_direction(cfg, clip_model)
    start = time.perf_counter()
    adapted, stage2 = adapt_generator(cfg, generator, clip_model, transform, directions, rng=rng)
    seconds.append(f"stage 2 {time.perf_counter() - start:.0f} s")
    history += stage2

    lines = "".join(json.dumps(record) + "\n" for record in history)
    write_whole(out / "history.jsonl", lambda f: f.write_text(lines))
    save_curves(history, out / "curves.png")
    psi = cfg.truncation_psi
    grid = sample_grid(generator, adapted, n=cfg.samples, seed=cfg.seed, truncation_psi=psi)
    save_picture(grid, out / "samples.png")
    write_whole(out / "generator.pt", lambda f: save_generator(adapted, f))

    world = f" --generator {cfg.generator}" if cfg.generator else ""
    print(
        f"{out / 'samples.png'}: {cfg.source} above, {cfg.target} below, from the same latents\n"
        f"{', '.join(seconds)}\n"
        "next:\n"
        f"  python ipl.py sample --run {out} --n 16 --seed 1 --out grid.png\n"
        f"  python ipl.py{world} --target {cfg.target!r} --method nada\n"
        f"  python ipl.py{world} --target 'another domain'\n"
        "  python ipl.py --generator FILE --clip ViT-B/32 --target 'any words'"
    )


def sample(
    run: Path,
    out: Path = Path("grid.png"),
    n: int = 16,
    seed: int = 1,
    truncation_psi: float | None = None,
    device: str = "auto",
):
    """Draw new samples from a finished run: source row over target row of the same latents.

    Args:
        run: Run folder.
        out: Picture to write.
        n: Number of samples. Sample i is the same for every n.
        seed: Seeds the latents.
        truncation_psi: Truncation; None for the run's own.
        device: auto, cpu, cuda or cuda:<n>.
    """
    with one_line_errors():
        if not (run / "generator.pt").is_file():
            raise ValueError(f"{run} is no finished run; wanted: a folder with a generator.pt")
        if out.suffix.lower() != ".png":
            raise ValueError(f"--out {out} must end in .png")
        try:
            cfg = Config(**json.loads((run / "config.json").read_text()))
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{run / 'config.json'} does not describe a run: {error}") from error
        psi = cfg.truncation_psi if truncation_psi is None else truncation_psi
        cfg = replace(cfg, samples=n, seed=seed, device=device, truncation_psi=psi)
        check(cfg)
        source = load_source(cfg)
        target = load_source(replace(cfg, generator=str(run / "generator.pt")))
        make_writable(out.parent)
    save_picture(sample_grid(source, target, n=n, seed=seed, truncation_psi=psi), out)
    print(f"{out}: {cfg.source} above, {cfg.target} below")


def main(argv=None):
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["sample"]:
        return tyro.cli(sample, args=argv[1:], prog="ipl.py sample")
    about = (
        "Adapt a generator to a new domain, from words alone. Defaults are the published ones; "
        "without --generator, those of MINIATURE in ipl.py. "
        "After a run: ipl.py sample --run RUN, see ipl.py sample --help."
    )
    cfg = tyro.cli(Config, args=argv, prog="ipl.py", description=about)
    if cfg.generator is None:
        cfg = tyro.cli(Config, args=argv, prog="ipl.py", description=about, default=MINIATURE)
    adapt(cfg)


if __name__ == "__main__":
    main()
