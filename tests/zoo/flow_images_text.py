"""Families of one class or two that draw from text alone (and CogView4's control)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLHunyuanImage,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    CogView4ControlPipeline,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
    PRXPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
)
from diffusers.utils import is_ftfy_available
from torch import nn
from transformers import (
    ByT5Tokenizer,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3VLModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5GemmaConfig,
    T5GemmaEncoder,
    UMT5Config,
    UMT5EncoderModel,
)

from zoo.encoders import (
    TEXT,
    chat_tokenizer,
    deep_autoencoder,
    gemma,
    gemma2,
    opening_tokenizer,
    qwen2_processor,
    qwen2_vl,
    qwen3_processor,
    qwen3_vl,
    qwen3_vl_config,
    qwen_autoencoder,
    t5,
    wan_autoencoder,
)
from zoo.entries import Build, Entry, Inputs, no_media
from zoo.media import picture
from zoo.parts import VOCABULARY, autoencoder, byte_tokenizer, clip_text, clip_tokenizer

WIDTH = TEXT["hidden_size"]
SHIFTED: dict[str, float] = {"shift_factor": 0.06, "scaling_factor": 1.5}


def euler(**more: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**more)


def aura_flow() -> DiffusionPipeline:
    return AuraFlowPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        vae=autoencoder(4),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        scheduler=euler(shift=1.73),
    )


def lumina2() -> DiffusionPipeline:
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 32, 32),
            cap_feat_dim=WIDTH,
        ),
        scheduler=euler(shift=3.0),
        vae=deep_autoencoder(4, 4, **SHIFTED),
        text_encoder=gemma2(),
        tokenizer=opening_tokenizer(),
    )


def lumina() -> DiffusionPipeline:
    transformer = LuminaNextDiT2DModel(
        sample_size=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    nn.init.zeros_(transformer.pad_token)  # left as the memory happens to be
    return LuminaPipeline(
        transformer=transformer,
        scheduler=euler(),
        vae=deep_autoencoder(4, 4),
        text_encoder=gemma(),
        tokenizer=opening_tokenizer(),
    )


def cogview4(cls: Callable[..., DiffusionPipeline], in_channels: int = 4) -> DiffusionPipeline:
    return cls(
        tokenizer=opening_tokenizer(),
        text_encoder=GlmModel(GlmConfig(**TEXT)),
        vae=autoencoder(4),
        transformer=CogView4Transformer2DModel(
            in_channels=in_channels,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=16,
            condition_dim=8,
            sample_size=8,
        ),
        scheduler=euler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    )


def smol_lm() -> SmolLM3ForCausalLM:
    """With the vocabulary of Llama 3: the class writes the number of a token of its own for an empty prompt."""
    return SmolLM3ForCausalLM(SmolLM3Config(**TEXT | {"vocab_size": 128_256}))


def bria_fibo_transformer() -> BriaFiboTransformer2DModel:
    return BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=WIDTH,
    )


def bria_fibo(cls: Callable[..., DiffusionPipeline] = BriaFiboPipeline) -> DiffusionPipeline:
    return cls(
        transformer=bria_fibo_transformer(),
        scheduler=euler(use_dynamic_shifting=True),
        vae=wan_autoencoder(4, 4),
        text_encoder=smol_lm(),
        tokenizer=byte_tokenizer(3000),
    )


def hidream() -> DiffusionPipeline:
    pipe = HiDreamImagePipeline(
        scheduler=euler(shift=3.0),
        vae=autoencoder(4, **SHIFTED),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=byte_tokenizer(),
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**TEXT, attn_implementation="eager")),
        tokenizer_4=byte_tokenizer(),
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[32, WIDTH],
            text_emb_dim=64,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
    )
    pipe.default_sample_size = 8  # the class enlarges every size to the area of this many latents
    return pipe


def hunyuan_image() -> DiffusionPipeline:
    """Its guidance is a component, with momentum from the second step on."""
    tokenizer = chat_tokenizer()
    return HunyuanImagePipeline(
        scheduler=euler(shift=5.0),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=16,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=32,
            scaling_factor=0.75,
        ),
        text_encoder=qwen2_vl(tokenizer, num_hidden_layers=3),
        tokenizer=tokenizer,
        text_encoder_2=t5(),
        tokenizer_2=ByT5Tokenizer(),
        transformer=HunyuanImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            rope_axes_dim=(8, 8),
        ),
        guider=AdaptiveProjectedMixGuidance(guidance_scale=4.0, adaptive_projected_guidance_start_step=1),
        ocr_guider=AdaptiveProjectedMixGuidance(guidance_scale=4.0, adaptive_projected_guidance_start_step=1),
    )


def krea2() -> DiffusionPipeline:
    tokenizer = chat_tokenizer()
    return Krea2Pipeline(
        scheduler=euler(use_dynamic_shifting=True),
        vae=qwen_autoencoder(),
        text_encoder=Qwen3VLModel(qwen3_vl_config(tokenizer)),
        tokenizer=tokenizer,
        transformer=Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=WIDTH,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        text_encoder_select_layers=(1, 2),
    )


def prx_transformer(channels: int, **more: Any) -> PRXTransformer2DModel:
    return PRXTransformer2DModel(
        in_channels=channels,
        patch_size=2,
        context_in_dim=WIDTH,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
        **more,
    )


def prx_encoder() -> T5GemmaEncoder:
    module = {name: value for name, value in TEXT.items() if not name.endswith("_id")}
    config = T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False, **TEXT)
    return T5GemmaEncoder(config.encoder)


def prx() -> DiffusionPipeline:
    return PRXPipeline(
        transformer=prx_transformer(4),
        scheduler=euler(shift=3.0),
        text_encoder=prx_encoder(),
        tokenizer=byte_tokenizer(32),
        vae=autoencoder(4, **SHIFTED),
    )


def prx_pixel() -> DiffusionPipeline:
    """It draws pixels: no autoencoder."""
    return PRXPixelPipeline(
        transformer=prx_transformer(3, bottleneck_size=8, resolution_embeds=True),
        scheduler=euler(shift=3.0),
        text_encoder=gemma2(),
        tokenizer=opening_tokenizer(),
        prompt_max_tokens=32,
    )


def kandinsky5_parts(visual_cond: bool = False) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "transformer": Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=32,
            time_dim=16,
            patch_size=(1, 2, 2),
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
            visual_cond=visual_cond,
        ),
        "vae": deep_autoencoder(4, 4),
        "text_encoder": qwen2_vl(tokenizer),
        "tokenizer": qwen2_processor(tokenizer),
        "text_encoder_2": clip_text(projection=False),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": euler(shift=5.0),
    }


def kandinsky5() -> DiffusionPipeline:
    pipe = Kandinsky5T2IPipeline(**kandinsky5_parts())
    pipe.resolutions = [(32, 32)]
    return pipe


class NoSafetyChecker:
    """Lets everything through. Cosmos takes no None for it, and the real one needs a package of many gigabytes."""

    def to(self, device: Any) -> NoSafetyChecker:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos2() -> DiffusionPipeline:
    return Cosmos2TextToImagePipeline(
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
        transformer=CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=WIDTH,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            patch_size=(1, 2, 2),
            rope_scale=(2.0, 1.0, 1.0),
            concat_padding_mask=False,  # the mask is enlarged by torchvision
            extra_pos_embed_type=None,
        ),
        vae=wan_autoencoder(2, 4),
        scheduler=euler(use_karras_sigmas=True),
        safety_checker=NoSafetyChecker(),
    )


def longcat_parts(vae: AutoencoderKL) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "scheduler": euler(use_dynamic_shifting=True),
        "vae": vae,
        "text_encoder": qwen2_vl(tokenizer),
        "tokenizer": tokenizer,
        "text_processor": qwen2_processor(tokenizer),
        "transformer": LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[4, 6, 6],
        ),
    }


def longcat() -> DiffusionPipeline:
    return LongCatImagePipeline(**longcat_parts(autoencoder(16, **SHIFTED)))


def nucleus() -> DiffusionPipeline:
    """With experts in the middle blocks: the first three and the last are dense."""
    tokenizer = chat_tokenizer()
    transformer = NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for name, parameter in transformer.named_parameters():
        if ".experts." in name:  # left as the memory happens to be
            nn.init.normal_(parameter, std=0.1)
    return NucleusMoEImagePipeline(
        transformer=transformer,
        scheduler=euler(),
        vae=qwen_autoencoder(),
        text_encoder=qwen3_vl(tokenizer),
        processor=qwen3_processor(tokenizer),
    )


def entry(build: Build, inputs: Inputs = no_media, side: int = 16, guided: float = 4.0, **call: Any) -> Entry:
    return Entry(build=build, call=call, size={"height": side, "width": side}, guided=guided, inputs=inputs)


ENTRIES: dict[str, Entry] = {
    "AuraFlowPipeline": entry(aura_flow, max_sequence_length=32),
    "Lumina2Pipeline": entry(lumina2, side=32, max_sequence_length=256),
    "LuminaPipeline": entry(lumina, side=32, max_sequence_length=256, clean_caption=False),
    "CogView4Pipeline": entry(lambda: cogview4(CogView4Pipeline), max_sequence_length=32),
    "CogView4ControlPipeline": entry(
        lambda: cogview4(CogView4ControlPipeline, 8),
        lambda row: {"control_image": picture(row)},
        max_sequence_length=32,
    ),
    "BriaFiboPipeline": entry(bria_fibo, side=64),
    "HiDreamImagePipeline": entry(hidream, max_sequence_length=32),
    "HunyuanImagePipeline": Entry(
        build=hunyuan_image, call={}, size={"height": 16, "width": 16}, guided=4.0, guidance_name="guider"
    ),
    "Krea2Pipeline": entry(krea2, max_sequence_length=64),
    "Kandinsky5T2IPipeline": entry(kandinsky5, side=32),
    "Cosmos2TextToImagePipeline": entry(cosmos2, max_sequence_length=32),
    "LongCatImagePipeline": entry(longcat, enable_prompt_rewrite=False),
    "NucleusMoEImagePipeline": entry(nucleus, max_sequence_length=512, return_index=-1),
}
if is_ftfy_available():  # both clean their prompts with it
    ENTRIES["PRXPipeline"] = entry(prx, use_resolution_binning=False)
    ENTRIES["PRXPixelPipeline"] = entry(prx_pixel, use_resolution_binning=False)
