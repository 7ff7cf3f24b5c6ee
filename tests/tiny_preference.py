"""A step-aware preference model of a few thousand weights."""

from __future__ import annotations

import torch
import zoo
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from flowsteer.rewards.scorers.step_preference import StepPreferenceModel


def tiny_clip() -> CLIPModel:
    """Two blocks in each tower, pictures of 16 pixels."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=zoo.parts.VOCABULARY, eos_token_id=1, bos_token_id=0, pad_token_id=1, **vision)
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config={**vision, "image_size": 16, "patch_size": 4})
    return CLIPModel(config).eval()


def tiny_model(*, perturbed: bool = False) -> StepPreferenceModel:
    model = StepPreferenceModel(tiny_clip(), zoo.parts.clip_tokenizer()).eval().requires_grad_(False)
    if perturbed:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.modulation.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model
