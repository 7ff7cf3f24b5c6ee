"""An export loaded by an older diffusers, in an environment of its own: the whole strength of training there, too.

Slow: pip installs the older packages.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import CLOSE, tuned, write
from safetensors.torch import load_file, save_file

OLDER = ("diffusers==0.33.1", "peft==0.15.2", "transformers==4.51.3", "huggingface_hub==0.30.2", "tokenizers==0.21.1")
DRAW_WITH_OLDER = """
import sys, torch, diffusers
from safetensors.torch import load_file, save_file
assert diffusers.__version__ == "0.33.1", diffusers.__version__
model, lora, inputs, output = sys.argv[1:]
transformer = diffusers.SD3Transformer2DModel.from_pretrained(model, subfolder="transformer")
others = dict.fromkeys("scheduler vae text_encoder tokenizer text_encoder_2 tokenizer_2 text_encoder_3 tokenizer_3".split())
diffusers.StableDiffusion3Pipeline(transformer=transformer, **others).load_lora_weights(lora)
with torch.no_grad():
    save_file({"velocity": transformer(**load_file(inputs)).sample}, output)
"""


@pytest.fixture(scope="module")
def older_python(tmp_path_factory) -> str:
    """An interpreter with an older diffusers, peft and transformers, and the torch of this one."""
    folder = tmp_path_factory.mktemp("older")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    paths = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
    )
    Path(paths.stdout.strip(), "zz_shared.pth").write_text("\n".join(site.getsitepackages()))  # searched last
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", *OLDER]
    done = subprocess.run(install, capture_output=True, text=True, timeout=480)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(OLDER)}: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [2, 8, 12])
def test_an_older_diffusers_loads_it_at_full_strength(older_python, alpha, tiny_sd3, tmp_path) -> None:
    """0.33.1 does not read the header: it takes alpha to be the rank, without a warning."""
    policy = tuned("sd3", alpha)
    transformer: Any = policy.denoisers["transformer"]
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn((1, config["in_channels"], 4, 4), generator=generator),
        "encoder_hidden_states": torch.randn((1, 8, config["joint_attention_dim"]), generator=generator),
        "pooled_projections": torch.randn((1, config["pooled_projection_dim"]), generator=generator),
        "timestep": torch.tensor([500.0]),
    }
    save_file(inputs, tmp_path / "inputs.safetensors")
    arguments = [
        tiny_sd3,
        write(policy, tmp_path / "export"),
        tmp_path / "inputs.safetensors",
        tmp_path / "out.safetensors",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [older_python, "-c", DRAW_WITH_OLDER, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        trained = transformer(**inputs).sample
        policy._variants.switch("current", "reference")
        base = transformer(**inputs).sample
    found = load_file(tmp_path / "out.safetensors")["velocity"]
    assert (found - trained).abs().max() < CLOSE
    assert (base - trained).abs().max() > 1e-2
