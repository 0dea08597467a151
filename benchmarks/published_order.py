"""The mathematics of ipl.py in the order of work of the published code: what a step costs there.

A step gives the loss, the chosen layers and the gradient that ipl.py gives. What differs, as found
by reading and running the published code (in brackets, where it does that):

both stages  CLIP's weights take part in every graph and collect gradients [CLIPLoss.__init__]
             texts are padded to 77 tokens, prompts are encoded one by one [text_encoder]
             nothing is kept from one step to the next: fixed texts are encoded again
             each image is convolved with weights of its own, in a group [ModulatedConv2d]
stage 1      79 templates of each label, and two fixed texts [global_clip_loss]
             the latents are mapped twice [train]
             the graph of CLIP's image features is built, then cut [global_clip_loss]
stage 2      the layer choice takes gradients of all weights, then drops them [determine_opt_layers]
             a fixed text is encoded twice, the bare label once [clip_directional_loss]
             the source image goes through CLIP with a graph [clip_directional_loss]
             CLIP's gradients are never reset: they add up over the whole run [train]
             Adam holds all weights of the generator; the average is a Python loop [train, ema]

Left out is what is no part of a step (an RN50 is loaded there and never used). Where the published
mathematics is another one, this is ours: the layer that is chosen is the one that the code feeds,
images are resized with antialias, all is float32 (deviations 2, 4, 5 of ipl.py).
"""

from unittest import mock

import torch
import torch.nn.functional as F

import ipl
from stylegan2_ops import generator, upfirdn2d


def tokenize(clip_model, texts):
    """Tokens [N, 77], padded with zeros."""
    tokens = ipl.openai_clip().tokenize(texts, context_length=clip_model.context_length)
    return tokens.to(clip_model.logit_scale.device)


def adam(cfg, stage, network):
    """Over all weights, in a loop of small operations, as in torch 1.7. Betas: StyleGAN2's."""
    if stage == 1:
        rate = {"lr": cfg.lr_mapper}
    else:
        rate = {"lr": cfg.lr * 4 / 5, "betas": (0.0, 0.99 ** (4 / 5))}
    return torch.optim.Adam(network.parameters(), **rate, foreach=False, fused=False)


def modulated_conv2d(
    x, weight, styles, noise=None, up=1, padding=0,
    resample_filter=None, demodulate=True, flip_weight=True,
):  # fmt: skip
    """As stylegan2_ops.modulated_conv, with weights made for each image. Kernels are square."""
    B, kw = len(x), weight.shape[3]
    weight = weight * styles[:, None, :, None, None]  # [B, out, in, kh, kw]
    if demodulate:
        weight = weight * (weight.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    if flip_weight != (up == 1):
        weight = weight.flip(3, 4)
    x = x.reshape(1, -1, *x.shape[2:])
    if up == 1:
        x = F.conv2d(x, weight.flatten(0, 1), padding=padding, groups=B)
    else:
        x = F.conv_transpose2d(x, weight.transpose(1, 2).flatten(0, 1), stride=up, groups=B)
        fw = resample_filter.shape[1]
        before, after = (fw + up - 1) // 2 - (kw - 1), (fw - up) // 2 - (kw - up)
        pads = [padding + before, padding + after] * 2
        x = upfirdn2d(x, resample_filter, padding=pads, gain=up**2)
    x = x.reshape(B, -1, *x.shape[2:])
    return x if noise is None else x + noise


def published_convolutions():
    """Inside, generators convolve each image with weights of its own."""
    return mock.patch.object(generator, "modulated_conv2d", modulated_conv2d)


def encode_texts(clip_model, texts):
    """E_T of N whole texts of 77 tokens: with a graph, which is then cut, [N, e]."""
    return clip_model.encode_text(tokenize(clip_model, texts)).detach()


def encode_prompts(clip_model, ctx, label):
    """E_T of prompts padded to 77 tokens, one by one: ctx [B, n_ctx, d] -> [B, e]."""
    tokens = tokenize(clip_model, label)
    L, n_ctx = tokens.shape[1], ctx.shape[1]
    text = clip_model.token_embedding(tokens)[0].detach()  # [L, d]
    eot, features = int(tokens.argmax()) + n_ctx, []
    for vectors in ctx:
        x = torch.cat([text[:1], vectors, text[1 : L - n_ctx]]) + clip_model.positional_embedding
        x = clip_model.transformer(x[:, None])[:, 0]
        features.append(clip_model.ln_final(x)[eot] @ clip_model.text_projection)
    return torch.stack(features)


def add_residual(cfg, clip_model, features, label, stage):
    """Prompt features [B, e] and the fixed text's, which is encoded anew (deviation 1)."""
    if cfg.residual == "none":
        return features
    bare = stage == 2 and cfg.residual == "published"
    text = cfg.ctx_init if bare else f"{cfg.ctx_init} {label}."
    return features + encode_texts(clip_model, [text])


def label_feature(clip_model, label):
    """The mean [e] over the templates."""
    features = encode_texts(clip_model, [template.format(label) for template in ipl.TEMPLATES])
    return (features / features.norm(dim=-1, keepdim=True)).mean(dim=0)


@published_convolutions()
def mapper_step(cfg, generator, clip_model, transform, mapper, optimizer, z):
    """A step of stage 1 from z [B, z_dim] -> its loss."""
    ctx = mapper(generator.mapping(z))
    t_source, t_target = (encode_prompts(clip_model, ctx, x) for x in (cfg.source, cfg.target))
    with torch.no_grad():
        images = generator.synthesis(generator.mapping(z))
    image_features = clip_model.encode_image(transform(images)).detach()
    t_source = add_residual(cfg, clip_model, t_source, cfg.source, stage=1)
    t_target = add_residual(cfg, clip_model, t_target, cfg.target, stage=1)
    domain_source = ipl.domain_loss(t_source, label_feature(clip_model, cfg.source))
    domain = ipl.domain_loss(t_target, label_feature(clip_model, cfg.target))
    loss = ipl.contrastive_loss(image_features, t_source, clip_model.logit_scale.exp())
    loss = loss + cfg.lambda_domain * (domain + cfg.lambda_source * domain_source)

    for module in (optimizer, clip_model, generator):
        module.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def choose_layers(cfg, target, clip_model, transform, w):
    """The W+ inputs that one step of SGD moves most, with gradients of every weight."""
    target.requires_grad_(True)
    w_plus = w[:, None].repeat(1, target.num_ws, 1).requires_grad_()
    sgd = torch.optim.SGD([w_plus], lr=cfg.layer_lr, foreach=False)
    image_features = clip_model.encode_image(transform(target.synthesis(w_plus)))
    text = clip_model.encode_text(tokenize(clip_model, cfg.target))
    loss = ipl.domain_loss(image_features, text)
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    change = cfg.layer_lr * w_plus.grad  # of w_plus itself, float32 would round it away
    target.requires_grad_(False)
    k = cfg.num_layers or max(1, 2 * target.num_ws // 3)
    return change.abs().mean(dim=-1).mean(dim=0).topk(k).indices.tolist()


@published_convolutions()
def generator_step(
    cfg, source, clip_model, transform, mapper, target, average, optimizer, z, layer_z
):
    """A step of stage 2 from z [B, z_dim] and the layer choice's -> its loss, the chosen layers."""
    with torch.no_grad():
        w = source.mapping(z)
        ctx = mapper(w)
        texts = [encode_prompts(clip_model, ctx, label) for label in (cfg.source, cfg.target)]
    chosen = choose_layers(cfg, target, clip_model, transform, source.mapping(layer_z))
    for j in chosen:
        target.layers()[j].requires_grad_(True)
    with torch.no_grad():
        x_source = source.synthesis(w)
    x_target = target.synthesis(w)
    t_source = add_residual(cfg, clip_model, texts[0], cfg.source, stage=2)
    t_target = add_residual(cfg, clip_model, texts[1], cfg.target, stage=2)
    source_features, target_features = (
        clip_model.encode_image(transform(x)) for x in (x_source, x_target)
    )
    delta_image = ipl.feature_delta(source_features, target_features)
    loss = ipl.directional_loss(delta_image, ipl.feature_delta(t_source, t_target), cfg.eps)

    for module in (source, target):
        module.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        current = target.state_dict()
        for name, x in average.state_dict().items():
            x.copy_(x * cfg.ema + current[name] * (1 - cfg.ema))
    return loss.item(), sorted(chosen)
