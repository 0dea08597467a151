"""Networks that pictures are measured with, of weights by a path: nothing here downloads unasked.

Of a file only tensors are taken, and its names and shapes have to be those of the network. All take
pictures uint8 [B, 3, H, W]; each has `sha256`, the first 12 digits of its file's.
"""

import hashlib
import io
import warnings
from importlib.util import find_spec
from itertools import pairwise

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from checkpoints.files import check_finite, check_names, is_safetensors, read_file, unwrapped
from checkpoints.pickles import CheckpointError, StoredTensor, read_pickled, tensor_reader
from cli.metric_formulas import unit

HED_MEAN = (104.00698793, 116.66876762, 122.67891434)  # blue, green, red, of 255


def read_state(path, kind):
    """The tensors of a state dict, by torch.save or in safetensors -> ({name: float32}, sha256).

    Counters of batches are left out. Raises CheckpointError, of one line.
    """

    def parse(data, notes):
        if is_safetensors(data):
            state = safetensors.torch.load(data)
            state = {name: x for name, x in state.items() if x.is_floating_point()}
        else:
            value, _ = read_pickled(data)
            if not isinstance(value, dict):
                raise CheckpointError(f"no state dict; wanted: {kind}")
            read = tensor_reader(4 * len(data))
            state = {name: read(name, x) for name, x in value.items() if not counts(x)}
        state = unwrapped(state, notes)
        check_finite(state)
        return {name: x.float() for name, x in state.items()}, hashlib.sha256(data).hexdigest()

    state, digest = read_file(path, kind, parse)
    return state, digest[:12]


def counts(stored):
    """Whether what read_pickled gives holds whole numbers."""
    return isinstance(stored, StoredTensor) and not stored.storage.dtype.is_floating_point


def fill(network, found, path, kind):
    """The network with what read_state has found, frozen. Raises CheckpointError, of one line,
    which names the first tensors that are lacking, surplus or misshapen."""
    state, network.sha256 = found
    own = network.state_dict()
    try:
        check_names(state, {k: x for k, x in own.items() if x.is_floating_point()}, kind)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    counters = {k: torch.zeros(x.shape, dtype=x.dtype) for k, x in own.items() if k not in state}
    nn.Module.load_state_dict(network, counters | state, assign=True)
    return network.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------
# Inception v3, in two versions: their scores differ


def load_inceptions(paths):
    """{"tf": that of FID and KID, "inception": that of IS and SIFID} of the files given; without
    the package torch-fidelity, which has the network of the first, it is left out."""
    kinds = {1008: "tf", 1000: "inception"}
    wanted = "weights of Inception v3, torchvision's or torch-fidelity's"
    found = {}
    for path in paths:
        state, digest = read_state(path, wanted)
        classes = len(state.get("fc.bias", ()))
        if classes not in kinds:
            why = f"{classes} classes" if classes else "it lacks 'fc.bias'"
            raise CheckpointError(f"{path}: not {wanted}: {why}")
        kind = kinds[classes]
        if kind in found:
            raise ValueError(f"--inception {path}: the second of its kind; wanted: one of each")
        if kind == "tf" and not find_spec("torch_fidelity"):
            continue
        make = {"tf": tf_inception, "inception": torchvision_inception}[kind]
        with torch.device("meta"):  # where tensors have no memory
            network = make()
        found[kind] = fill(network, (state, digest), path, wanted)
    return found


def tf_inception():
    """torch-fidelity's network, with weights of zero bytes: `fill` brings its own.

    Its constructor would download them, or run what is in a file. Called, it gives (pool3
    [B, 2048], logits without bias [B, 1008]).
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Inception(FeatureExtractorInceptionV3):
        def load_state_dict(self, _):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Inception("inception", ["2048", "logits_unbiased"], nothing)


def torchvision_inception():
    from torchvision.models import inception_v3

    return inception_v3(weights=None, init_weights=False, transform_input=False)


def class_logits(inception, x, sides=(299,)):
    """Logits [B, 1000] of torchvision's, of pictures resized to each of the sides in turn."""
    images = 2 * unit(x) - 1
    for side in sides:
        images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    return inception(images)


def positions(inception, x, channels=192):
    """Features [B, positions, channels] before the first (64) or the second (192) pooling, of
    pictures as large as they are: what SIFID takes the distribution of (SinGAN, SIFID)."""
    network, images = inception, 2 * unit(x) - 1
    x = network.Conv2d_2b_3x3(network.Conv2d_2a_3x3(network.Conv2d_1a_3x3(images)))
    if channels == 192:
        x = network.Conv2d_4a_3x3(network.Conv2d_3b_1x1(network.maxpool1(x)))
    return x.flatten(2).mT


# ----------------------------------------------------------------------------------------------
# HED: edges (Xie and Tu, 2015), under the names of sniklaus/pytorch-hed


class Hed(nn.Module):
    """Edges [B, 1, H, W], whole numbers up to 255: VGG's five stages, a map of each, their sum."""

    STAGES = {
        "One": (3, 64, 64),
        "Two": (64, 128, 128),
        "Thr": (128, 256, 256, 256),
        "Fou": (256, 512, 512, 512),
        "Fiv": (512, 512, 512, 512),
    }

    def __init__(self):
        super().__init__()
        for name, widths in self.STAGES.items():
            layers = [] if name == "One" else [nn.MaxPool2d(2)]
            for a, b in pairwise(widths):
                layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
            setattr(self, f"moduleVgg{name}", nn.Sequential(*layers))
            setattr(self, f"moduleScore{name}", nn.Conv2d(widths[-1], 1, 1))
        self.moduleCombine = nn.Sequential(nn.Conv2d(5, 1, 1), nn.Sigmoid())

    def forward(self, x):
        size, maps = x.shape[-2:], []
        h = x.float().flip(1) - torch.tensor(HED_MEAN, device=x.device)[:, None, None]
        for name in self.STAGES:
            h = getattr(self, f"moduleVgg{name}")(h)
            score = getattr(self, f"moduleScore{name}")(h)
            maps.append(F.interpolate(score, size, mode="bilinear", align_corners=False))
        return (self.moduleCombine(torch.cat(maps, dim=1)) * 255).floor()


def load_hed(path):
    kind = "weights of HED, network-bsds500.pytorch"
    with torch.device("meta"):
        network = Hed()
    return fill(network, read_state(path, kind), path, kind)


# ----------------------------------------------------------------------------------------------
# ArcFace's IR-SE50: who it is (Deng et al., 2019), under the names of TreB1eN/InsightFace_Pytorch


class Squeeze(nn.Module):
    """Channels weighted by what all of the picture says (squeeze and excitation)."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(width // 16, width, 1, bias=False)

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Unit(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride)
        if a != b:
            conv = nn.Conv2d(a, b, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(conv, nn.BatchNorm2d(b))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(a),
            nn.Conv2d(a, b, 3, padding=1, bias=False),
            nn.PReLU(b),
            nn.Conv2d(b, b, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(b),
            Squeeze(b),
        )

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class ArcFace(nn.Module):
    """Unit vectors [B, 512] of aligned faces: averaged to 256 x 256, rows 35 to 222 and columns 32
    to 219 of these, averaged to 112 x 112 (DiffusionCLIP, losses/id_loss.py)."""

    def __init__(self, depths=(3, 4, 14, 3), widths=(64, 64, 128, 256, 512)):
        super().__init__()
        conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.input_layer = nn.Sequential(conv, nn.BatchNorm2d(64), nn.PReLU(64))
        units = []
        for depth, (a, b) in zip(depths, pairwise(widths), strict=True):
            units += [Unit(a, b, 2)] + [Unit(b, b, 1) for _ in range(depth - 1)]
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512), nn.Dropout(), nn.Flatten(), nn.Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512),
        )  # fmt: skip

    def forward(self, x):
        images = F.adaptive_avg_pool2d(2 * unit(x) - 1, 256)[:, :, 35:223, 32:220]
        h = self.body(self.input_layer(F.adaptive_avg_pool2d(images, 112)))
        return F.normalize(self.output_layer(h), dim=1)


def load_arcface(path):
    kind = "weights of ArcFace's IR-SE50, model_ir_se50.pth"
    with torch.device("meta"):
        network = ArcFace()
    return fill(network, read_state(path, kind), path, kind)


# ----------------------------------------------------------------------------------------------
# LPIPS (Zhang et al., 2018): how unlike pictures look


class Lpips(nn.Module):
    """Embeddings [B, d] of pictures resized to 256 x 256: LPIPS of two of them is the squared
    distance, as its heads are weights, none of them below 0, of squared differences.

    model: lpips.LPIPS, with sound weights.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        from lpips import normalize_tensor

        size, parts = (256, 256), []
        images = F.interpolate(2 * unit(x) - 1, size, mode="bilinear", antialias=True)
        maps = self.model.net(self.model.scaling_layer(images))
        for h, head in zip(maps, self.model.lins, strict=True):
            h = normalize_tensor(h) * head.model[-1].weight.sqrt()
            parts.append(h.flatten(1) / (h.shape[2] * h.shape[3]) ** 0.5)
        return torch.cat(parts, dim=1)


def load_lpips(path):
    """Lpips of VGG16: its backbone's weights are torchvision's, by the path; the package has the
    heads."""
    import lpips

    kind = "torchvision's VGG16, vgg16-397923af.pth"
    state, digest = read_state(path, kind)
    state = {name: x for name, x in state.items() if not name.startswith("classifier.")}
    with warnings.catch_warnings(action="ignore"):  # its way of calling torchvision is an old one
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    slices, backbone = model.net.children(), nn.Module()
    layers = {name: layer for part in slices for name, layer in part.named_children()}
    backbone.features = nn.ModuleDict(layers)
    network = Lpips(model)
    network.sha256 = fill(backbone, (state, digest), path, kind).sha256
    return network.eval().requires_grad_(False)
