"""Our U-Net, steps and folders beside those of diffusers, where it is installed."""

import json

import pytest
import torch
from conftest import close, rng
from test_diffusion import ddpm, read

from checkpoints.diffusion import SCHEDULE, from_guided, load_unet, save_unet
from diffusion import UNet, alphas_cumprod, step
from diffusion.steps import everywhere
from diffusion.unet import config_of

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its imports


def theirs(folder):
    return diffusers.UNet2DModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True
    ).eval()


def guided():
    golden = read("models")["improved"]
    state = {name: x.float() for name, x in golden["state_dict"].items()}
    config, state = from_guided(state, head=golden["kwargs"]["num_head_channels"])
    unet = UNet(config)
    unet.load_state_dict(state)
    return unet.eval().requires_grad_(False)


def small():
    torch.manual_seed(0)
    kinds = dict(layers_per_block=2, norm_num_groups=4, attention_head_dim=8)
    return UNet(config_of(16, (8, 16, 16), (False, True, False), **kinds)).requires_grad_(False)


@pytest.mark.parametrize("ours", [lambda: ddpm(read("models")["state_dict"]), guided, small])
def test_the_same_noise_and_the_same_steps(ours, tmp_path):
    """DDPM's layout, guided-diffusion's and a new network, through a folder in its layout."""
    unet = ours()
    save_unet(unet.config, unet.state_dict(), tmp_path)
    other, (again, _) = theirs(tmp_path), load_unet(tmp_path)
    x = torch.randn(2, 3, 16, 16, generator=rng())
    times = torch.tensor([3, 700])
    noise = unet(x, times)
    close(other(x, times).sample[:, :3], noise, rtol=1e-5)
    close(again(x, times), noise, rtol=1e-6)

    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path)  # its steps are not ours: 0, ..
    scheduler.set_timesteps(10)
    noise = unet(x, everywhere(x, 200))
    expected = scheduler.step(noise, 200, x)  # to 200 - 1000/10
    y, x0 = step(x, noise, 200, 100, alphas_cumprod())
    close(y, expected.prev_sample, rtol=1e-5)
    close(x0, expected.pred_original_sample, rtol=1e-5)


def test_a_folder_of_theirs_opens(tmp_path):
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval().requires_grad_(False)  # fmt: skip
    model.save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    unet, alphas = load_unet(tmp_path)
    x, t = torch.randn(2, 3, 16, 16, generator=rng()), torch.tensor([0, 999])
    close(unet(x, t), model(x, t).sample, rtol=1e-5)
    close(alphas, diffusers.DDPMScheduler().alphas_cumprod, rtol=1e-6)
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == SCHEDULE["prediction_type"]
