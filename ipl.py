"""Image-specific prompt learning (IPL, CVPR 2023, arXiv 2304.03119) in one file.

A generator of one domain ("photo") learns another ("anime") from the two words and CLIP alone:
  1. a mapper F turns each latent w into m prompt vectors, P = F(w): a prompt for every image;
  2. stage 1 trains F: "[P] photo" must match the image of w, and "[P] anime" must mean anime;
  3. the step from "[P] photo" to "[P] anime" in CLIP's text space is that image's own direction;
  4. stage 2 trains a copy of the generator: its images must move that way in CLIP's image space.
NADA, the baseline, is the same second stage with one direction for all images.

    z --G.mapping--> w --F--> P --[SOS] P label [EOT]--> E_T --> t_source, t_target
                     +--G_source.synthesis--> x_source --> E_I --+  stage 1: contrastive + domain
                     +--G_target.synthesis--> x_target --> E_I --+  stage 2: directional
Axes: B batch, m = n_ctx prompt vectors, d CLIP's text width, e CLIP's joint width, L tokens,
R resolution, W = num_ws, the number of w inputs of the synthesis network.

     equation (the numbers are ours)                      function            notebook
 (1) P = F(w)                                             LatentMapper        01_mapper
 (2) t = E_T([SOS] P label [EOT])                         encode_prompts      02_prompts
 (3) L_contr = 1/2 [CE(s I T', diag) + CE(s T I', diag)]  contrastive_loss    03_losses
 (4) L_domain = mean[1 - cos(t_target, ensemble)]         domain_loss         03_losses
 (5) L_stage1 = L_contr + lambda L_domain, over F         train_mapper        04_stage1
 (6) delta = norm(target) - norm(source), of prompts, x   feature_delta       03_losses
 (7) L_stage2 = mean[1 - cos(delta_image, delta_text)]    directional_loss    03_losses
 (8) top k of mean |change of W+|                         select_layers       05_stage2
 (9) L_stage2 over G_target, and its moving average       adapt_generator     05_stage2

Run it: `python ipl.py --source photo --target anime`, or `--help`; the commands are in cli/.
Copy it: it needs torch, numpy, tqdm and clip; `adapt` does both stages with a generator of yours.

Where it departs, or can, from the published code ("there"; its file:line in brackets)
 1. Residual prompts. There a fixed text's feature is added to the learned prompt's: in stage 1 that
    of "a photo of a photo." to the source's and of "a photo of a anime." to the target's, in stage
    2 that of "a photo of a" to both. `residual="published"` (default) does this, "label" is stage 1
    in both, "none" adds nothing, as in the paper. [clip_loss.py:206,212,242; train.py:215]
 2. Layer choice is off by one there: index j >= 2 of W+ feeds convs[j - 1] but frees convs[j - 2],
    and index 1 frees a ToRGB layer. Here the layer that is fed is the layer that is freed.
 3. The directional loss divides by |delta_image|, 0/0 for equal images. There, and by default here
    (`eps=0, noise="fresh"`), each call of synthesis draws noise: no two images are equal. eps > 0
    divides by sqrt(|delta_image|^2 + eps^2) and allows fixed noise. [clip_loss.py:225-226]
 4. Images are resized for CLIP with antialiasing; torchvision 0.9, as used there, had none.
 5. CLIP runs in float32, there in float16. `autocast="clip"` runs its image encoder in bfloat16.
 6. n_ctx counts prompt vectors, there the words of ctx_init. [train.py:79-80,112]
 7. Samples are truncated towards the generator's own average; there it is drawn anew each time.
 8. Work that changes no number is left out: fixed texts are encoded once, prompts not padded, CLIP
    and layer choice collect no gradients of weights. [clip_loss.py:249-251,256-257]
 9. Off by default: `crop`, `freeze`, `layers="all"`, ours; `betas` ... `log_loss`, DiffusionCLIP's.
10. Processes that share a batch draw fresh noise from their own seeds.
11. `bank`, ours and off by default: stage 1 chooses its batches from so many images, encoded once,
    and each prompt must find its own image among all of them, not only in its batch.
12. `lambda_image`, ours and 0 by default: a pull of each source prompt onto its own image.
"""

import contextlib
import copy
import io
import math
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm


# -- 0. Configuration. The defaults are the published values; the comments are the --help texts ----
@dataclass(frozen=True)
class Config:
    source: str = "photo"  # What the generator draws, in words.
    target: str = "anime"  # What it shall draw, in words.
    method: Literal["ipl", "nada"] = "ipl"  # Own prompts for each image; or one direction for all.
    clip_weights: tuple[float, ...] = ()  # Weight of each CLIP in stage 2; else 1.
    n_ctx: int = 4  # Prompts: number of learned vectors, m; deviation 6 of ipl.py.
    ctx_init: str = "a photo of a"  # Prompts: the fixed text of residual prompts.
    residual: Literal["published", "label", "none"] = "published"  # Prompts: deviation 1 of ipl.py.
    lr_mapper: float = 0.05  # Stage 1: Adam's learning rate.
    batch_mapper: int = 32  # Stage 1: images per step.
    steps_mapper: int = 300  # Stage 1: number of steps.
    bank: int = 0  # Stage 1: images encoded once, to choose from and to contrast with; 0: new ones.
    lambda_domain: float = 1.0  # Stage 1: weight of the domain loss.
    lambda_source: float = 0.0  # Stage 1: the source label's part in it; the target's is 1.
    lambda_image: float = 0.0  # Stage 1: weight of 1 - cos of source prompts and their images.
    lr: float = 0.002  # Stage 2: learning rate.
    batch: int = 2  # Stage 2: images per step.
    steps: int = 300  # Stage 2: number of steps.
    ema: float = 0.99  # Stage 2: decay of the moving average, which is the result.
    eps: float = 0.0  # Stage 2: smooths |delta_image| near 0; deviation 3 of ipl.py.
    noise: Literal["fresh", "fixed"] = "fresh"  # Drawn in each call, or the generator's constant.
    crop: float = 0.0  # Stage 2: the same random crop of both images, by up to this part.
    betas: tuple[float, float] = (0.0, 0.99)  # Stage 2: Adam's.
    plain_adam: bool = False  # Stage 2: lr and betas as they are; else 4/5 of lr, betas to the 4/5.
    growth: tuple[float, int] = (1.0, 50)  # Stage 2: factor of the rate, after so many steps each.
    log_loss: bool = False  # Stage 2: -log(1 - d/2) of the directional loss d, as DiffusionCLIP.
    layers: Literal["adaptive", "all"] = "adaptive"  # Stage 2: layers trained in each step.
    num_layers: int | None = None  # Adaptive choice: how many. None: two thirds.
    layer_batch: int = 8  # Adaptive choice: number of latents.
    layer_lr: float = 0.01  # Adaptive choice: step size; of one step, it cannot change the choice.
    layer_every: int = 1  # Adaptive choice: made in every n-th step, and kept in between.
    freeze: str = ""  # Stage 2: leave parameters with this in their name alone, e.g. noise.
    # Faster, with other numbers: half precision for CLIP's image encoder, or for all networks.
    autocast: Literal["none", "clip", "all"] = "none"
    half: Literal["bf16", "fp16"] = "bf16"  # The half precision of autocast.
    compile: bool = False  # CLIP's image encoder through torch.compile; on a GPU, in CUDA graphs.


# -- 1. What we need of a generator, and of the program around us ----------------------------------
class Generator(Protocol):
    """An nn.Module in eval mode; its methods work on w's device. `check_generator` looks."""

    z_dim: int
    w_dim: int  # if there is a code_dim, too, F reads the last code_dim numbers of w
    num_ws: int  # W
    resolution: int  # R
    w_avg: torch.Tensor  # [w_dim], the centre of truncation

    def mapping(self, z):
        """z [B, z_dim] -> w [B, w_dim]."""

    def synthesis(self, w, *, rng=None):
        """w [B, w_dim] or [B, W, w_dim] -> images [B, 3, R, R] in [-1, 1], not clamped; with fixed
        noise, or with fresh noise drawn from rng, a torch.Generator on w's device."""

    def layers(self):
        """W modules that stage 2 may train; layers()[j] is the convolution that w[:, j] feeds."""


@contextlib.contextmanager
def plain_torch():
    """Inside, torch is as it starts, whatever the program around has set: dtype, device, modes."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            with torch.autocast("cuda", enabled=False), torch.device("cpu"):
                yield
    finally:
        torch.set_default_dtype(dtype)


@plain_torch()
def check_generator(generator):
    """Hold an object to the protocol of `Generator`, by two images of it: shapes, values, gradient,
    the same from W equal w, W layers(), float32, eval mode; or ValueError, of one sentence."""
    try:
        W, R, w_dim = generator.num_ws, generator.resolution, generator.w_dim
        z = torch.randn(2, generator.z_dim, generator=torch.Generator().manual_seed(0))
        w = generator.mapping(z.to(generator.w_avg.expand(w_dim))).detach()
        w_plus = w[:, None].repeat(1, W, 1).requires_grad_()
        x, x_plus = generator.synthesis(w, rng=None), generator.synthesis(w_plus, rng=None)
        shapes, wanted = (w.shape, x.shape), ((2, w_dim), (2, 3, R, R))
        low, high, apart = x.min().item(), x.max().item(), (x_plus - x).abs().mean().item()
        kinds = {(p.dtype, p.is_inference()) for p in generator.parameters()}
        modules = sum(isinstance(layer, nn.Module) for layer in generator.layers())
    except Exception as error:  # whatever a stranger's methods can raise
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"generator does not fit ipl.Generator: {found}") from error
    for fits, problem in (
        (shapes == wanted, f"w and images are {[*map(list, shapes)]}; wanted: {wanted}"),
        (modules == W, f"{modules} modules in layers(); wanted: num_ws, {W}"),
        (x_plus.requires_grad, "no gradient flows from its images to w"),
        (generator.w_avg.isfinite().all(), "its w_avg is not finite"),
        (-25 < low < 0 and high < 25, f"its images lie in [{low:.3g}, {high:.3g}], not [-1, 1]"),
        (apart < 0.01, "a w for each layer, all alike, draws another image than one w for all"),
        (kinds == {(torch.float32, False)}, "its weights are not float32, or of inference_mode"),
        (not generator.training, "it is in training mode; wanted: generator.eval()"),
    ):
        if not fits:
            raise ValueError(f"generator does not fit ipl.Generator: {problem}")


def check_config(cfg):
    """Raises ValueError, in one sentence, for settings that cannot be meant."""
    if cfg.source.lower().split() == cfg.target.lower().split():  # CLIP reads lower case
        raise ValueError(f"Config: source and target are both {cfg.target!r}; wanted: two domains")
    least = {"batch_mapper": 2, "bank": cfg.bank and cfg.batch_mapper}
    for name, kind in get_type_hints(Config).items():
        value = getattr(cfg, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"Config({name}={value!r}); wanted: one of {get_args(kind)}")
        if kind is int and value < least.get(name, 1):  # all of them are counts
            raise ValueError(f"Config({name}={value}); wanted: at least {least.get(name, 1)}")


def truncate(w, w_avg, psi):
    """w drawn towards the average latent: fewer oddities, less variety."""
    return w_avg + psi * (w - w_avg)


# -- 2. CLIP and its image transform ---------------------------------------------------------------
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def openai_clip():
    """The package `clip`, imported when it is first needed: with torchvision, it takes a second."""
    with warnings.catch_warnings(action="ignore"):  # it imports pkg_resources, which is deprecated
        import clip
    if not hasattr(clip, "tokenize"):
        raise ImportError(f"{clip} is not OpenAI's; wanted: pip install clip-anytorch")
    return clip


@plain_torch()
def load_clip(name_or_path, device="cpu"):
    """A CLIP, frozen and in float32 (deviation 5), and its transform of images; or ValueError.

    A name goes to clip.load, which downloads the model once. A file of a state dict under OpenAI's
    key names, or such a dict, is read as tensors alone; clip.load would run an archive's code.
    """
    clip, state = openai_clip(), name_or_path
    try:
        if state in clip.available_models():
            clip_model, _ = clip.load(state, device="cpu", jit=False)
        else:
            if not isinstance(state, dict):
                state = torch.load(state, map_location="cpu", weights_only=True)
            state = dict(state)  # of which build_model takes what is no weight
            clip_model = clip.model.build_model(state).float()
            clip_model.load_state_dict(state)  # build_model has rounded it to float16
    except Exception as error:  # whatever a download or a foreign file can raise
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise
        name = "state dict" if isinstance(name_or_path, dict) else repr(str(name_or_path))
        wanted = f"OpenAI's names or, when online, one of {', '.join(clip.available_models())}"
        found = f"CLIP {name} cannot be loaded ({type(error).__name__})"
        raise ValueError(f"{found}; wanted: tensors under {wanted}") from error
    clip_model = clip_model.float().requires_grad_(False).eval().to(device)
    return clip_model, lambda images: clip_transform(images, clip_model.visual.input_resolution)


def clip_transform(images, resolution):
    """CLIP's preprocessing on tensors: images [B, 3, H, W] in [-1, 1] -> [B, 3, r, r].

    Differentiable, and without a clamp: a pixel outside [-1, 1] keeps its gradient.
    """
    x = (images + 1) / 2
    H, W = x.shape[-2:]
    short = min(H, W)
    if short != resolution:  # deviation 4: antialiasing
        size = (H * resolution // short, W * resolution // short)
        x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
    top, left = (round((side - resolution) / 2) for side in x.shape[-2:])
    x = x[..., top : top + resolution, left : left + resolution]
    return (x - x.new_tensor(CLIP_MEAN)[:, None, None]) / x.new_tensor(CLIP_STD)[:, None, None]


def half_precision(cfg, tensor, *parts):
    """Autocast, if cfg.autocast is one of the parts."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[cfg.half]
    return torch.autocast(tensor.device.type, kind, enabled=cfg.autocast in parts)


def image_encoder(clip_model, transform, cfg=None):
    """E_I: a function of images [B, 3, R, R] in [-1, 1] -> features [B, e], not normalised."""
    cfg, encode, weight = cfg or Config(), clip_model.encode_image, clip_model.text_projection
    if weight.dtype != torch.float32 or weight.is_inference():  # as clip.load has it on a GPU
        raise ValueError(f"clip_model is in {weight.dtype}; wanted: float32, as by ipl.load_clip")
    if cfg.compile:  # on a GPU, in CUDA graphs
        encode = torch.compile(encode, mode="reduce-overhead" if weight.is_cuda else "default")

    def encode_images(images):
        with half_precision(cfg, images, "clip", "all"):
            return encode(transform(images)).float()

    return encode_images


# -- 3. The latent mapper --------------------------------------------------------------------------
class LatentMapper(nn.Module):
    """F of equation (1), w -> P, in the shape of StyleGAN's mapping network: pixel norm, then four
    linear layers with equalised learning rate (multiplier 0.01), each followed by leaky ReLU (slope
    0.2, gain sqrt(2)) - the last one too, as published. To save one, and to load it again:
        torch.save(mapper.state_dict(), "mapper.pt")
        mapper.load_state_dict(torch.load("mapper.pt", weights_only=True))
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
        """w [B, w_dim], or more numbers of which it reads the last -> ctx [B, n_ctx, ctx_dim]."""
        w = w[:, -self.weights[0].shape[1] :]
        x = w * (w.square().mean(dim=-1, keepdim=True) + 1e-8).rsqrt()
        for weight, bias in zip(self.weights, self.biases, strict=True):
            scale = self.lr_mul / math.sqrt(weight.shape[1])
            x = F.linear(x, weight * scale, bias * self.lr_mul)
            x = F.leaky_relu(x, 0.2) * math.sqrt(2)
        return x.unflatten(-1, (self.n_ctx, self.ctx_dim))


# -- 4. Prompts ------------------------------------------------------------------------------------
# Of OpenAI's CLIP notebook (MIT), * = a and the; 79, as published: no "a photo of many {}."
TEMPLATES = """
a bad photo of * {}.|a sculpture of * {}.|a photo of * hard to see {}.|
a low resolution photo of * {}.|a rendering of * {}.|graffiti of * {}.|a cropped photo of * {}.|
a tattoo of * {}.|* embroidered {}.|a bright photo of * {}.|a photo of * clean {}.|
a photo of * dirty {}.|a dark photo of * {}.|a drawing of * {}.|* plastic {}.|a photo of * cool {}.|
a close-up photo of * {}.|a black and white photo of * {}.|a painting of * {}.|
a pixelated photo of * {}.|a jpeg corrupted photo of * {}.|a blurry photo of * {}.|a photo of * {}.|
a good photo of * {}.|* {} in a video game.|a doodle of * {}.|* origami {}.|a sketch of * {}.|
* toy {}.|a rendition of * {}.|a photo of * large {}.|a photo of * nice {}.|a photo of * weird {}.|
* cartoon {}.|art of * {}.|itap of * {}.|* plushie {}.|a photo of * small {}."""
TEMPLATES = [
    line.replace("*", a) for line in TEMPLATES.replace("\n", "").split("|") for a in ("a", "the")
]
TEMPLATES += ["a photo of my {}.", "itap of my {}.", "a photo of one {}."]


def tokenize(clip_model, texts):
    """Tokens [N, L], cut to the longest text, and the position [N] of each one's EOT."""
    try:
        tokens = openai_clip().tokenize(texts, context_length=clip_model.context_length)
    except RuntimeError as error:  # "Input ... is too long for context length 77"
        raise ValueError(f"{error}; wanted: a shorter source, target or ctx_init") from error
    eot = tokens.argmax(dim=-1)  # EOT has the highest number of all tokens
    device = clip_model.positional_embedding.device
    return tokens[:, : int(eot.max()) + 1].long().to(device), eot.to(device)


def encode_embeddings(clip_model, x, eot):
    """CLIP's text encoder from the embeddings on: x [N, L, d], eot [N] -> features [N, e].

    Attention is causal: nothing behind EOT can change the feature that is read there, so that
    padding to 77 tokens, as in clip_model.encode_text, would only cost time (deviation 8).
    """
    N, L, _ = x.shape
    x = x + clip_model.positional_embedding[:L]
    causal_mask = torch.full((L, L), -math.inf, device=x.device, dtype=x.dtype).triu(1)
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
    """[SOS] ctx label [EOT] as embeddings: ctx [B, n_ctx, d] -> [B, L, d]; ValueError, if long."""
    B, n_ctx, _ = ctx.shape
    tokens, _ = tokenize(clip_model, label)  # [1, L - n_ctx]
    L, limit = n_ctx + tokens.shape[1], clip_model.context_length
    if L > limit:
        raise ValueError(f"{n_ctx} vectors and {label!r} make {L} tokens; this CLIP reads {limit}")
    text = clip_model.token_embedding(tokens).expand(B, -1, -1)  # [SOS] label [EOT]
    return torch.cat([text[:, :1], ctx, text[:, 1:]], dim=1)


def encode_prompts(clip_model, ctx, label):
    """t = E_T([SOS] ctx label [EOT]), equation (2): ctx [B, n_ctx, d] -> [B, e], not normalised."""
    prompts = construct_prompts(clip_model, ctx, label)
    eot = torch.full(prompts.shape[:1], prompts.shape[1] - 1, device=prompts.device)
    return encode_embeddings(clip_model, prompts, eot)


def label_features(clip_model, label, templates=TEMPLATES):
    """What a label means in general: the mean [e] of its normalised features in many sentences."""
    texts = [template.format(label) for template in templates]
    if not clip_model.token_embedding(tokenize(clip_model, label)[0]).any(dim=-1).all():
        warnings.warn(f"this CLIP has never read {label!r}; wanted: words it has", stacklevel=3)
    return F.normalize(encode_texts(clip_model, texts), dim=-1).mean(dim=0)


def residual_features(cfg, clip_model, stage):
    """What is added to the features of source and target prompts, [2, e] (deviation 1)."""
    texts = [f"{cfg.ctx_init} {label}." for label in (cfg.source, cfg.target)]
    if cfg.residual == "published" and stage == 2:
        texts = [cfg.ctx_init, cfg.ctx_init]
    return encode_texts(clip_model, texts) * (cfg.residual != "none")


def prompt_features(cfg, clip_model, mapper, stage):
    """A function of w [B, w_dim] -> the features [B, e] of source and of target prompts."""
    residual_source, residual_target = residual_features(cfg, clip_model, stage)

    def features_of(w):
        ctx = mapper(w)  # [B, n_ctx, d]
        t_source = encode_prompts(clip_model, ctx, cfg.source) + residual_source
        t_target = encode_prompts(clip_model, ctx, cfg.target) + residual_target
        return t_source, t_target

    return features_of


# -- 5. Losses: a function for each equation, on features [B, e] of any scale ----------------------
def feature_delta(source_features, target_features):
    """delta of equation (6), [B, e]: the step between two features, of images or of texts."""
    return F.normalize(target_features, dim=-1) - F.normalize(source_features, dim=-1)


def contrastive_loss(image_features, text_features, logit_scale, bank=None, index=None):
    """L_contr, equation (3): each image matches its own prompt and no other of the batch.

    A prompt that all images share makes the image-to-text half exactly log B, whatever it says.
    bank [N, e], index [B]: features of more images, and where in it those of the batch are; each
    prompt then matches its own image and no other of the bank (deviation 11).
    """
    image_features = F.normalize(image_features, dim=-1)
    text_features = F.normalize(text_features, dim=-1)
    logits = logit_scale * image_features @ text_features.T  # [B, B]
    match = torch.arange(len(logits), device=logits.device)
    texts = logits.T if bank is None else logit_scale * text_features @ F.normalize(bank, dim=-1).T
    of_texts = F.cross_entropy(texts, match if bank is None else index)
    return (F.cross_entropy(logits, match) + of_texts) / 2


def domain_loss(text_features, label_feature):
    """L_domain, equation (4): mean 1 - cos of features [B, e] and one [e], or one for each."""
    return (1 - F.cosine_similarity(text_features, label_feature, dim=-1)).mean()


def directional_loss(delta_image, delta_text, eps=0.0):
    """L_stage2, equation (7): each image's step in CLIP's space goes along its text's; both [B, e].

    With eps = 0, as published, the gradient near equal images grows as 1 / |delta_image|, and Adam,
    which remembers it, then hardly moves; eps > 0 keeps it below 1 / eps (deviation 3).
    """
    delta_text = F.normalize(delta_text, dim=-1)
    length = (delta_image.square().sum(dim=-1) + eps**2).sqrt()  # [B]
    return (1 - (delta_image * delta_text).sum(dim=-1) / length).mean()


# -- 6. Layer choice -------------------------------------------------------------------------------
def select_layers(generator, text_loss, w, k, *, lr=0.01, rng=None, at_once=8):
    """The k of W inputs that matter most for a text, equation (8): indices, and the weights [W].

    An input's weight: how far one step of SGD on the W+ codes of w [N, w_dim], towards the text,
    would move it, mean |lr * gradient|; none is taken. text_loss: images -> their mean loss.
    No image's gradient depends on another's: at_once of them are in memory (deviation 8).
    """
    weights = 0
    for codes in w.split(at_once):
        share = len(codes) / len(w)  # the chunk's part of both means over images
        w_plus = codes[:, None].repeat(1, generator.num_ws, 1).requires_grad_()  # [., W, w_dim]
        loss = share * text_loss(generator.synthesis(w_plus, rng=rng))
        (grad,) = torch.autograd.grad(loss, w_plus)
        weights = weights + share / ranks()[1] * (lr * grad).abs().mean(dim=(0, 2))  # [W]
    sum_over_processes([weights])  # ranks differ in nothing else, and agree
    return weights.topk(k).indices.tolist(), weights


# -- 7. Many processes: each draws the whole batch, works on its own rows, gathers features --------
def ranks():
    """Which process of how many this is; `x.unflatten(0, (processes, -1))[rank]` are its rows."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x):
    """All processes' rows [B, e], of which only one's own have a gradient: so it can be summed."""
    rank, processes = ranks()
    rows = [torch.empty_like(x) for _ in range(processes)]
    if processes > 1:
        dist.all_gather(rows, x.detach().contiguous())
    rows[rank] = x
    return torch.cat(rows)


def sum_over_processes(tensors):
    """Each tensor, in place."""
    for x in tensors if ranks()[1] > 1 else ():
        dist.all_reduce(x)


# -- 8. What both training loops share -------------------------------------------------------------
def progress(stage, total, state, done=0):
    """The steps of both loops, with a bar or, where there is no terminal, lines; state is what they
    train, by name. Another generator of steps can look on:
        def watch(stage, total, state):
            for step in ipl.progress(stage, total, state):
                yield step
                film.append(state["average"].module.synthesis(w))
    """
    shown = sys.stderr and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    looks = {"desc": f"stage {stage}", "file": None if shown else io.StringIO()}
    with tqdm(total=total, initial=done, disable=ranks()[0] > 0, **looks) as bar:
        said = time.perf_counter()
        for step in range(done, total):
            yield step
            bar.set_postfix(loss=f"{state['history'][-1]['loss']:.3f}", refresh=False)
            bar.update()
            due = step in (done + 2, total - 1) or time.perf_counter() > said + 10
            if due and not shown and not bar.disable:
                said = time.perf_counter()
                with contextlib.suppress(OSError, ValueError):  # a log that is closed
                    print(bar, file=sys.stderr, flush=True)


def random_inputs(cfg, generator, rng, draw_z=None):
    """draw: n -> this process's z of n, and noise_of: step -> the rng of synthesis, or None.
    Latents are drawn on the CPU: a seed means the same people on every device."""
    device, seed = generator.w_avg.device, int(torch.randint(2**31, (), generator=rng))
    draw_z = draw_z or (lambda n: torch.randn(n, generator.z_dim, generator=rng))
    rank, processes = ranks()

    def noise_of(step):
        if cfg.noise == "fresh":  # deviation 10
            return torch.Generator(device).manual_seed(seed + step * processes + rank)

    return lambda n: draw_z(n).unflatten(0, (processes, -1))[rank].to(device), noise_of


def finite_row(wanted, **row):
    """A row with its scalar tensors as numbers; FloatingPointError if loss or gradient are not."""
    tensors = {name: x.detach() for name, x in row.items() if torch.is_tensor(x)}
    row |= zip(tensors, torch.stack([*tensors.values()]).tolist(), strict=True)
    if not math.isfinite(row["loss"] + row["grad_norm"]):
        found = f"loss is {row['loss']:.3g}, the gradient's norm {row['grad_norm']:.3g}"
        raise FloatingPointError(f"stage {row['stage']}, step {row['step']}: {found}; {wanted}")
    return row


# -- 9. Stage 1: the mapper learns -----------------------------------------------------------------
@torch.no_grad()
def accuracy(image_features, text_features):
    """The share of images [B, e] whose own text [B, e] is the nearest; by chance, 1 / B."""
    similar = F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T
    return (similar.argmax(dim=1) == torch.arange(len(similar)).to(similar.device)).float().mean()


@plain_torch()
def train_mapper(
    cfg, generator, clip_model, transform, *, rng, mapper=None, draw_z=None, steps=progress
):
    """Stage 1, equation (5) -> the mapper of one CLIP, and a history, a row for each step.

    With several CLIPs, call it for each: their mappers share nothing.
    rng: a torch.Generator on the CPU, the only source of randomness. mapper: where to start, else
    a new one. draw_z: n -> z [n, z_dim], else normal; as `lambda n: my_z[:n]`. steps: `progress`.
    A row: {"stage": 1, "step": 0, "loss": 4.2, "contrastive": 3.4, "domain": 0.8,
    "domain_source": 0.7, "accuracy": 0.03, "grad_norm": 0.1}.
    Raises FloatingPointError when loss or gradient stop being finite, ValueError for arguments.
    """
    check_config(cfg)
    check_generator(generator)
    if mapper is None:
        width, ctx = getattr(generator, "code_dim", generator.w_dim), clip_model.token_embedding
        mapper = LatentMapper(width, cfg.n_ctx, ctx.embedding_dim, rng).to(generator.w_avg.device)
    draw, noise_of = random_inputs(cfg, generator, rng, draw_z)
    E_I = image_encoder(clip_model, transform, cfg)
    with torch.no_grad():  # constants are encoded once
        logit_scale = clip_model.logit_scale.exp()
        label_source = label_features(clip_model, cfg.source)
        label_target = label_features(clip_model, cfg.target)
    features_of = prompt_features(cfg, clip_model, mapper, stage=1)

    @torch.no_grad()
    def encode(z, noise):
        w = generator.mapping(z)
        with half_precision(cfg, w, "all"):
            x_source = generator.synthesis(w, rng=noise).float()
        return w, E_I(x_source)

    bank, index, bank_z = None, None, gather(draw(cfg.bank)) if cfg.bank else None
    parameters = list(mapper.parameters())
    optimizer, history = torch.optim.Adam(parameters, lr=cfg.lr_mapper, fused=True), []
    state = {"mapper": mapper, "optimizer": optimizer, "rng": rng, "history": history}
    for step in steps(1, cfg.steps_mapper, state):
        if cfg.bank and bank is None:  # deviation 11; each process encodes it whole
            noise = torch.Generator(bank_z.device).manual_seed(0) if cfg.noise == "fresh" else None
            parts = [encode(z, noise) for z in bank_z.split(cfg.batch_mapper)]
            bank_w, bank = map(torch.cat, zip(*parts, strict=True))
        if cfg.bank:
            index = torch.randperm(cfg.bank, generator=rng)[: cfg.batch_mapper].to(bank.device)
            image_features, own = bank[index], index.unflatten(0, (ranks()[1], -1))[ranks()[0]]
            w = bank_w[own]
        else:
            w, image_features = encode(draw(cfg.batch_mapper), noise_of(step))
            image_features = gather(image_features)
        t_source, t_target = map(gather, features_of(w))
        contrastive = contrastive_loss(image_features, t_source, logit_scale, bank, index)
        domain = domain_loss(t_target, label_target)
        domain_source = domain_loss(t_source, label_source)
        loss = contrastive + cfg.lambda_domain * (domain + cfg.lambda_source * domain_source)
        loss = loss + cfg.lambda_image * domain_loss(t_source, image_features)  # deviation 12
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        gradients = [p.grad for p in parameters]
        sum_over_processes(gradients)
        history.append(finite_row(
            "wanted: a smaller lr_mapper", stage=1, step=step, loss=loss, contrastive=contrastive,
            domain=domain, domain_source=domain_source, accuracy=accuracy(image_features, t_source),
            grad_norm=nn.utils.get_total_norm(gradients),
        ))  # fmt: skip
        optimizer.step()
    if (share := np.mean([row["accuracy"] for row in history[-10:]])) < 2 / cfg.batch_mapper:
        found = f"stage 1 learned little: {share:.0%} of the images find their own prompt"
        warnings.warn(f"{found}; wanted: more steps_mapper, or another lr_mapper", stacklevel=3)
    return mapper, history


# -- 10. Stage 2: a copy of the generator learns ---------------------------------------------------
# A direction is a function (w, z, x_source) -> delta_text [B, e], of latents and source images.
def prompt_directions(cfg, clip_model, mapper):
    """IPL's direction, from each image's source prompt to its target prompt."""
    features_of = prompt_features(cfg, clip_model, mapper, stage=2)
    return torch.no_grad()(lambda w, z=None, x_source=None: feature_delta(*features_of(w)))


def label_direction(cfg, clip_model):
    """NADA's direction, the difference of the labels' ensembles, the same for every image."""
    with torch.no_grad():
        delta = label_features(clip_model, cfg.target) - label_features(clip_model, cfg.source)
    return lambda w, z=None, x_source=None: delta.expand(len(w), -1)


def random_windows(n, crop, rng):
    """n windows, of sides 1 - crop to 1; this process's of them, as affine maps [., 2, 3]."""
    scale = 1 - crop * torch.rand(n, 1, generator=rng)
    shift = (1 - scale) * (2 * torch.rand(n, 2, generator=rng) - 1)
    windows = torch.cat([torch.diag_embed(scale.expand(n, 2)), shift[:, :, None]], dim=2)
    return windows.unflatten(0, (ranks()[1], -1))[ranks()[0]]


def crop_images(images, windows):
    """Each image [B, 3, R, R] through its window, at the same resolution; None: all of it."""
    if windows is None:
        return images
    grid = F.affine_grid(windows.to(images), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@plain_torch()
def adapt_generator(
    cfg, generator, clips, directions, *, rng,
    target=None, layers=None, texts=None, draw_z=None, source_images=None, more_loss=None,
    steps=progress,
):  # fmt: skip
    """Stage 2, equation (9) -> the moving average of the adapted generator, and a history.

    clips: (clip_model, transform) of each CLIP; their losses are summed, with cfg.clip_weights.
    directions: one for each, of prompt_directions, label_direction, or yours.
    target: what to train, in place; else a copy of the generator, which itself stays as it is.
    layers: the W modules to choose from, else target.layers(). texts: for each CLIP the feature [e]
    that the choice steers to, else the bare target label's. rng, draw_z, steps: as in stage 1; the
    images' z is drawn before that of the layer choice. The average starts at `generator`.
    source_images: z -> x_source, else the generator's. more_loss: (x_source, x_target) -> [B], what
    each image adds to its loss, as for an identity that shall stay.
    A row: {"stage": 2, "step": 0, "loss": 0.9, "delta_image_norm": 0.2, "layers": [0, 3],
    "grad_norm": 1.5}. Raises FloatingPointError and ValueError, as stage 1.
    """
    check_config(cfg)
    check_generator(generator)
    weights = cfg.clip_weights or [1.0] * len(clips)
    if not 0 < len(weights) == len(clips) == len(directions) or not all(map(callable, directions)):
        found = f"{len(clips)} clips, {len(directions)} directions, {len(weights)} clip_weights"
        raise ValueError(f"{found}; wanted: as many, each direction a function (w, z, x_source)")
    if (share := cfg.ema**cfg.steps) > 0.2:
        found = f"after {cfg.steps} steps {share:.0%} of the average is still the source generator"
        warnings.warn(f"{found}; wanted: more steps, or a smaller ema", stacklevel=3)
    source, num_ws = generator, generator.num_ws
    target = copy.deepcopy(source) if target is None else target
    average = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    average.requires_grad_(False).n_averaged.fill_(1)  # the source counts: the first step averages
    draw, noise_of = random_inputs(cfg, source, rng, draw_z)
    mapping = torch.no_grad()(source.mapping)
    encoders = [image_encoder(model, transform, cfg) for model, transform in clips]
    with torch.no_grad():
        texts = texts or [encode_texts(model, cfg.target)[0] for model, _ in clips]

    def text_loss(images):  # of the layer choice
        parts = zip(weights, encoders, texts, strict=True)
        return sum(weight * domain_loss(gather(E_I(images)), text) for weight, E_I, text in parts)

    k = cfg.num_layers or max(1, 2 * num_ws // 3)  # int(2 (2 log2(R) - 2) / 3) in the paper
    trainable = [  # W lists of parameters: index j has those of the layer it feeds (deviation 2)
        [p for name, p in layer.named_parameters() if not (cfg.freeze and cfg.freeze in name)]
        for layer in layers or target.layers()
    ]
    parameters = list(dict.fromkeys(p for group in trainable for p in group))
    if not parameters or not 0 < k <= num_ws:
        raise ValueError(f"nothing to train: freeze={cfg.freeze!r}, num_layers={k} of {num_ws}")
    # 4/5: StyleGAN2's correction for regularising in every fourth step only, kept by NADA and IPL
    lr, power = (cfg.lr, 1) if cfg.plain_adam else (cfg.lr * 4 / 5, 4 / 5)
    betas = [beta**power for beta in cfg.betas]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)
    history, chosen = [], list(range(num_ws))
    state = {"target": target, "average": average, "optimizer": optimizer, "rng": rng}
    for step in steps(2, cfg.steps, state | {"history": history, "layers": chosen}):
        z, noise = draw(cfg.batch), noise_of(step)
        w = mapping(z)
        target.requires_grad_(False)
        if cfg.layers == "adaptive" and k < num_ws and step % cfg.layer_every == 0:
            codes = mapping(draw(cfg.layer_batch))
            with half_precision(cfg, codes, "all"):
                chosen[:], _ = select_layers(
                    target, text_loss, codes, k, lr=cfg.layer_lr, rng=noise, at_once=len(z)
                )
        for p in [p for j in chosen for p in trainable[j]]:
            p.requires_grad_()
        windows = random_windows(cfg.batch, cfg.crop, rng) if cfg.crop else None  # deviation 9
        with half_precision(cfg, w, "all"):
            with torch.no_grad():
                x_source = source_images(z) if source_images else source.synthesis(w, rng=noise)
            x_target = target.synthesis(w, rng=noise)
        x_source, x_target = x_source.float(), x_target.float()
        loss, lengths = 0, []
        for E_I, direction, weight in zip(encoders, directions, weights, strict=True):
            with torch.no_grad():
                delta_text = gather(direction(w, z, x_source))
                source_features = gather(E_I(crop_images(x_source, windows)))
            target_features = gather(E_I(crop_images(x_target, windows)))
            delta_image = feature_delta(source_features, target_features)
            d = directional_loss(delta_image, delta_text, cfg.eps)
            loss = loss + weight * (-(1 - d / 2).log() if cfg.log_loss else d)
            lengths.append(delta_image.norm(dim=-1).mean())
        if more_loss:
            loss = loss + gather(more_loss(x_source, x_target)).mean()
        optimizer.zero_grad()  # to None, so that Adam passes over the layers not chosen
        loss.backward(inputs=[p for p in parameters if p.requires_grad])
        gradients = [p.grad for p in parameters if p.grad is not None]
        sum_over_processes(gradients)
        history.append(finite_row(
            "wanted: a smaller lr" if step else "wanted: eps=0.1, as the images do not differ yet",
            stage=2, step=step, loss=loss, delta_image_norm=torch.stack(lengths).mean(),
            layers=sorted(chosen), grad_norm=nn.utils.get_total_norm(gradients),
        ))  # fmt: skip
        optimizer.param_groups[0]["lr"] = lr * cfg.growth[0] ** (step // cfg.growth[1])
        optimizer.step()
        average.update_parameters(target)
    target.requires_grad_(False)
    return average.module, history


@plain_torch()
def adapt(cfg, generator, clips, *, rng, draw_z=None, steps=progress, redirect=list, **of_stage_2):
    """Both stages -> the adapted generator, a mapper for each CLIP (none for NADA), the history.
    draw_z, steps: of both stages; redirect: directions -> those of stage 2, as to mix in others;
    of_stage_2: further arguments of adapt_generator.

    clips = [ipl.load_clip("ViT-B/32", device)]  # of several, rows of stage 1 have a "clip"
    rng = torch.Generator().manual_seed(0)
    adapted, mappers, history = ipl.adapt(ipl.Config(), generator, clips, rng=rng)
    """
    mappers, directions, history = [], [], []
    shared = {"rng": rng, "draw_z": draw_z, "steps": steps}
    for i, (clip_model, transform) in enumerate(clips):
        if cfg.method == "nada":
            directions.append(label_direction(cfg, clip_model))
        else:
            mapper, rows = train_mapper(cfg, generator, clip_model, transform, **shared)
            mappers.append(mapper)
            directions.append(prompt_directions(cfg, clip_model, mapper))
            history += [{**row, "clip": i} for row in rows] if len(clips) > 1 else rows
    directions = redirect(directions)
    adapted, rows = adapt_generator(cfg, generator, clips, directions, **shared, **of_stage_2)
    return adapted, mappers, history + rows


# -- 11. Samples -----------------------------------------------------------------------------------
def sample_latents(n, z_dim, seed):
    """z [n, z_dim], row after row from one seed: sample i is the same for every n."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, z_dim), np.float32))


@plain_torch()
@torch.no_grad()
def sample_grid(source, target, *, n=8, seed=0, truncation_psi=0.7, columns=8):
    """Source row over target row of the same w, with fixed noise: a picture, uint8 [H, W, 3]."""
    rows = []
    for z in sample_latents(n, source.z_dim, seed).to(source.w_avg.device).split(columns):
        w = truncate(source.mapping(z), source.w_avg, truncation_psi)  # deviation 7
        for generator in (source, target):
            row = torch.cat(list(generator.synthesis(w)), dim=-1)  # [3, R, len(z) R]
            rows.append(F.pad(row, (0, (min(n, columns) - len(z)) * row.shape[-2]), value=1))
    grid = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().clamp(0, 255)
    if not grid.isfinite().all():
        raise ValueError("images that are not finite; wanted: generators with sound weights")
    return grid.permute(1, 2, 0).to("cpu", torch.uint8)


if __name__ == "__main__":
    sys.modules["ipl"] = sys.modules["__main__"]  # what cli imports as ipl: not executed twice
    try:
        from cli import main
    except ModuleNotFoundError as error:
        wanted = "wanted: the whole repository, Linux or macOS, and pip install -r requirements.txt"
        raise SystemExit(f"ipl.py: there is no {error.name}; {wanted}") from None
    main()
