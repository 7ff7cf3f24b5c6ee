"""Tiny random reward models in the file formats in which the real ones are published.

HPSv2 and ImageReward are written under their packages' names, not converted from transformers' classes: so that the
rewards' key maps are tested, and so that the packages themselves can read the files. For the packages:

- hpsv2: set ``open_clip.factory._MODEL_CONFIGS["ViT-H-14"]`` to `HPSV2_MODEL` with the image size given here, and write the
  checkpoint with the package's own vocabulary (``vocab_size=49408``);
- image-reward: give `MED_CONFIG` as its ``med_config``, make its vision tower with `IMAGE_REWARD_VISION` and its ``MLP`` for
  embeddings of 192 numbers; and preprocess to 32 pixels.

Widths are multiples of the real models' head widths (80 and 64), which no tensor tells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import zoo
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerModel,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
)

HPSV2_MODEL: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 514, "width": 128, "heads": 2, "layers": 2},
}
IMAGE_REWARD_VISION = {"img_size": 32, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2}
WORDS = ("a", "red", "blue", "circle", "square", "very", "long", "prompt", "enc", "[", "]", ",")
MED_CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 5 + len(WORDS) + 2,
    "encoder_width": 128,
    "add_cross_attention": True,
}
HEAD_WIDTHS = (1024, 128, 64, 16, 1)  # of the linear layers, as in the real ones
LABELS = ("bench", "mouse", "dog")


class _Random:
    """Tensors of a seed, one after the other, large enough that everything that is read makes a difference."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.15, around: float = 0.0) -> Tensor:
        return around + scale * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, out: int, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(out, width, scale=1.5 * width**-0.5), f"{name}.bias": self(out)}

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self(width, around=1.0), f"{name}.bias": self(width)}


def clip_tokenizer(folder: Path) -> Path:
    """CLIP's without merges: a token per byte, start and end last, as in the real vocabulary."""
    characters = zoo.parts.byte_characters()
    pieces = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    return folder


def clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIP model with its tokenizer, as transformers writes it: PickScore, CLIPScore, what aesthetic heads stand on."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {**tower, "image_size": 16, "patch_size": 4}
    model = _seeded(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=24), seed)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    return clip_tokenizer(folder)


def siglip(folder: Path, *, seed: int = 0) -> Path:
    """A SigLIP model of both towers, as transformers writes it."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 16}, vision_config={**tower, "image_size": 18, "patch_size": 6}
    )
    model = _seeded(SiglipModel, config, seed)
    model.save_pretrained(folder)
    return folder


def aesthetic_head(file: Path, width: int, *, prefix: str = "layers.", places=(0, 2, 4, 6, 7), seed: int = 0) -> Path:
    """Linear layers as a torch pickle with gaps where dropout is; of v2.5: ``scoring_head.`` and places 0, 2, 4, 6, 8."""
    torch.save(_head(_Random(seed), prefix, width, places), file)
    return file


def hpsv2(file: Path, *, image_size: int = 28, vocab_size: int = 514, seed: int = 0) -> Path:
    """A checkpoint of `HPSV2_MODEL` under open_clip's names, float16 as the published ones."""
    random, vision, text, embed = _Random(seed), HPSV2_MODEL["vision_cfg"], HPSV2_MODEL["text_cfg"], 48
    width, patch = vision["width"], vision["patch_size"]
    state = {
        "positional_embedding": random(text["context_length"], text["width"]),
        "text_projection": random(text["width"], embed),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": random(width),
        "visual.positional_embedding": random((image_size // patch) ** 2 + 1, width),
        "visual.proj": random(width, embed),
        "visual.conv1.weight": random(width, 3, patch, patch, scale=0.04),
        **random.norm("visual.ln_pre", width),
        **_open_clip_blocks(random, "visual.transformer", vision["layers"], width),
        **random.norm("visual.ln_post", width),
        **_open_clip_blocks(random, "transformer", text["layers"], text["width"]),
        "token_embedding.weight": random(vocab_size, text["width"], scale=0.5),
        **random.norm("ln_final", text["width"]),
    }
    torch.save({"state_dict": {name: value.half() for name, value in state.items()}}, file)
    return file


def bert_tokenizer(folder: Path) -> Path:
    """BERT's, with the few words of `WORDS`."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, model_max_length=512).save_pretrained(
        folder
    )
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")  # what older transformers read
    return folder


def image_reward(file: Path, *, seed: int = 0) -> Path:
    """A checkpoint of `IMAGE_REWARD_VISION` and `MED_CONFIG` under the package's names."""
    random, width, text = _Random(seed), IMAGE_REWARD_VISION["embed_dim"], MED_CONFIG["hidden_size"]
    patch, words = IMAGE_REWARD_VISION["patch_size"], MED_CONFIG["max_position_embeddings"]
    seen, read = "blip.visual_encoder", "blip.text_encoder"
    state = {
        f"{seen}.cls_token": random(1, 1, width),
        f"{seen}.pos_embed": random(1, (IMAGE_REWARD_VISION["img_size"] // patch) ** 2 + 1, width),
        f"{seen}.patch_embed.proj.weight": random(width, 3, patch, patch, scale=0.04),
        f"{seen}.patch_embed.proj.bias": random(width),
        **random.norm(f"{seen}.norm", width),
        f"{read}.embeddings.position_ids": torch.arange(words)[None],
        f"{read}.embeddings.word_embeddings.weight": random(MED_CONFIG["vocab_size"], text, scale=0.5),
        f"{read}.embeddings.position_embeddings.weight": random(words, text),
        **random.norm(f"{read}.embeddings.LayerNorm", text),
        **random.linear("blip.vision_proj", 16, width),
        **random.linear("blip.text_proj", 16, text),
        **_head(random, "mlp.layers.", text, (0, 2, 4, 6, 7)),
    }
    for block in range(IMAGE_REWARD_VISION["depth"]):
        name = f"{seen}.blocks.{block}"
        state |= random.norm(f"{name}.norm1", width) | random.linear(f"{name}.attn.qkv", 3 * width, width)
        state |= random.linear(f"{name}.attn.proj", width, width) | random.norm(f"{name}.norm2", width)
        state |= random.linear(f"{name}.mlp.fc1", 4 * width, width) | random.linear(f"{name}.mlp.fc2", width, 4 * width)
    for layer in range(MED_CONFIG["num_hidden_layers"]):
        name, inner = f"{read}.encoder.layer.{layer}", MED_CONFIG["intermediate_size"]
        for kind, source in (("attention", text), ("crossattention", width)):
            state |= random.linear(f"{name}.{kind}.self.query", text, text)
            state |= random.linear(f"{name}.{kind}.self.key", text, source)
            state |= random.linear(f"{name}.{kind}.self.value", text, source)
            state |= random.linear(f"{name}.{kind}.output.dense", text, text)
            state |= random.norm(f"{name}.{kind}.output.LayerNorm", text)
        state |= random.linear(f"{name}.intermediate.dense", inner, text)
        state |= random.linear(f"{name}.output.dense", text, inner) | random.norm(f"{name}.output.LayerNorm", text)
    torch.save(state, file)
    return file


def mask2former(folder: Path, *, seed: int = 2) -> Path:
    """A Mask2Former for instances of `LABELS` as facebook's are published: the model's tensors, the head's, the loss's.

    In noise it sees up to five objects, of all three classes, with confidences far from GenEval's threshold.
    """
    window = 2
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=window,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        id2label=dict(enumerate(LABELS)),
        label2id={label: place for place, label in enumerate(LABELS)},
        architectures=["Mask2FormerForUniversalSegmentation"],
    )
    model, random = _seeded(Mask2FormerModel, config, seed), _Random(seed)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        published = _published_swin_name(name)
        if published is not None:
            state[f"model.{published}"] = value.contiguous()
        if published and published.endswith("relative_position_bias_table"):
            places = torch.arange(window**2).expand(window**2, -1)  # which of the table; nothing reads them
            state[f"model.{published.removesuffix('bias_table')}index"] = places.contiguous()
    state |= random.linear("class_predictor", len(LABELS) + 1, 32)
    state["class_predictor.weight"] *= 6  # surer of what it sees
    state["criterion.empty_weight"] = torch.ones(len(LABELS) + 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


def _published_swin_name(name: str) -> str | None:
    """The name of a Mask2Former's tensor in the published files; None of what they lack.

    From transformers' ``convert_mask2former_original_pytorch_checkpoint_to_pytorch.py``, ``replace_swin_backbone``.
    """
    backbone = "pixel_level_module.encoder."
    if not name.startswith(backbone):
        return name
    if name.startswith(f"{backbone}swin.layernorm."):
        return None
    for new, old in (
        (".swin.", "."),
        (".attention.q_proj.", ".attention.self.query."),
        (".attention.k_proj.", ".attention.self.key."),
        (".attention.v_proj.", ".attention.self.value."),
        (".attention.o_proj.", ".attention.output.dense."),
        (".attention.relative_position_bias.", ".attention.self."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ):
        name = name.replace(new, old)
    return name


def _seeded(cls: Any, config: Any, seed: int) -> Any:
    """A model of that seed. The real initialisation leaves much near zero, where nothing would be compared with nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config)
    random = _Random(seed)
    for parameter in model.parameters():
        parameter.data += random(*parameter.shape, scale=0.1)
    return model


def _head(random: _Random, prefix: str, width: int, places: tuple[int, ...]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for place, out in zip(places, HEAD_WIDTHS):
        state |= random.linear(f"{prefix}{place}", out, width)
        width = out
    return state


def _open_clip_blocks(random: _Random, name: str, layers: int, width: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for layer in range(layers):
        block = f"{name}.resblocks.{layer}"
        state |= random.norm(f"{block}.ln_1", width)
        state[f"{block}.attn.in_proj_weight"] = random(3 * width, width, scale=1.5 * width**-0.5)
        state[f"{block}.attn.in_proj_bias"] = random(3 * width)
        state |= random.linear(f"{block}.attn.out_proj", width, width) | random.norm(f"{block}.ln_2", width)
        state |= random.linear(f"{block}.mlp.c_fc", 4 * width, width)
        state |= random.linear(f"{block}.mlp.c_proj", width, 4 * width)
    return state
