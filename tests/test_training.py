"""Layer choice, both training loops and the published trajectories (golden/README.md)."""

import copy
from pathlib import Path

import pytest
import torch

import ipl
from stylegan2_ops import load_generator

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = ipl.Config(
    source="photo", target="anime", noise="fixed", num_layers=4, batch_mapper=4, batch=2
)


def close(actual, expected, rtol=1e-4, scale=1e-5):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    atol = scale * float(expected.abs().max())
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "ipl_losses.pt", weights_only=True)


@pytest.fixture(scope="module")
def clip_pair():
    return ipl.load_clip(GOLDEN / "clip_tiny.pt")


@pytest.fixture(scope="module")
def source():
    return load_generator(GOLDEN / "rosinality_tiny.pt").requires_grad_(False).eval()


@pytest.fixture
def target(source, golden):
    target = copy.deepcopy(source)
    missing, unexpected = target.load_state_dict(golden["trainable_state_params"], strict=False)
    assert not unexpected
    return target


@pytest.fixture
def mapper(golden):
    mapper = ipl.LatentMapper(32, 4, 64)
    for i in range(4):
        mapper.weights[i].data.copy_(golden["mapper_state"][f"mapping.mapping.{i + 1}.weight"])
        mapper.biases[i].data.copy_(golden["mapper_state"][f"mapping.mapping.{i + 1}.bias"])
    return mapper


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def replay(*batches):
    """A draw_z that hands out the given latents, in order, and checks their number."""
    queue = list(batches)

    def draw_z(n):
        z = queue.pop(0)
        assert len(z) == n
        return z

    return draw_z


def published_layers(generator):
    """The published map: index j >= 2 frees convs[j - 2], index 1 a ToRGB (METHOD, no. 2)."""
    return [generator.conv1, generator.to_rgb1, *generator.convs]


# --------------------------------------------------------------------------------------------
# Layer choice


def test_select_layers(golden, clip_pair, target):
    g = golden["layer_selection"]
    encode_images = ipl.image_encoder(*clip_pair)
    text_feature = ipl.encode_texts(clip_pair[0], g["text"])[0]
    chosen, weights = ipl.select_layers(target, encode_images, g["w"], text_feature, 4, lr=0.01)
    close(weights, g["layer_weights_from_grad"])
    assert set(chosen) == set(g["chosen_idx_topk_order"])


def test_stage1_trajectory(golden, clip_pair, source, mapper):
    g = golden["stage1_trajectory"]
    cfg = ipl.replace(PUBLISHED, steps_mapper=5)
    before = copy.deepcopy(mapper)
    mapper, history = ipl.train_mapper(
        cfg, source, *clip_pair, rng=rng(), mapper=mapper, draw_z=replay(*g["z"])
    )
    for record, expected in zip(history, g["losses"], strict=True):
        close(record["loss"], expected["total"])
        close(record["contrastive"], expected["contrastive"])
        close(record["domain_target"], expected["target_domain"])
        close(record["domain_source"], expected["source_domain"])
    for name, expected in g["final_mapper"].items():
        i, kind = int(name.split(".")[2]) - 1, name.split(".")[3]
        start = {"weight": before.weights, "bias": before.biases}[kind][i]
        end = {"weight": mapper.weights, "bias": mapper.biases}[kind][i]
        close(end - start, expected - start.detach(), rtol=1e-2, scale=1e-3)


def test_stage2_trajectory(golden, clip_pair, source, target, mapper):
    g = golden["stage2_trajectory"]
    cfg = ipl.replace(PUBLISHED, steps=4)
    start = copy.deepcopy(target)
    latents = [z for z, step in zip(g["z"], g["steps"], strict=True) for z in (z, step["layer_z"])]
    average, history = ipl.adapt_generator(
        cfg,
        source,
        *clip_pair,
        ipl.prompt_directions(cfg, clip_pair[0], mapper),
        rng=rng(),
        target=target,
        layers=published_layers(target),
        draw_z=replay(*latents),
    )
    for record, expected in zip(history, g["steps"], strict=True):
        close(record["loss"], expected["loss"])
        assert set(record["layers"]) == set(expected["chosen_idx"])
    states = [dict(m.named_parameters()) for m in (source, start, target, average)]
    for name, change in g["param_change_norm"].items():
        frozen, first, last, ema = (state[name] for state in states)
        close((last - first).norm(), change, rtol=1e-2)
        close(last.norm(), g["final_param_norm"][name])
        close(ema.norm(), g["final_ema_param_norm"][name])
    for name, expected in g["final_param"].items():
        _, first, last, _ = (state[name] for state in states)
        close(last - first, expected - first, rtol=1e-2, scale=1e-3)
    for name, expected in g["final_ema_param"].items():
        frozen, _, _, ema = (state[name] for state in states)
        close(ema - frozen, expected - frozen, rtol=1e-2, scale=1e-3)
    image = target.synthesis(golden["stage2"]["w"])
    close(image, g["final_image_trainable_from_stage2_w"], rtol=1e-2, scale=1e-3)
