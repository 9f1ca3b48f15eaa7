"""Tiny tokenizers, processors and encoders. All text embeddings have width 32, so every encoder fits every denoiser."""

import functools
import string
from pathlib import Path
from typing import Any

import torch
import transformers

import kspec_guidance

WIDTH = 32
HEADS = 4
LAYERS = 2
SPECIAL_TOKENS = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = Path(kspec_guidance.__file__).parent / "demo" / "assets" / "emoji" / "tokenizer"


@functools.cache
def clip_tokenizer() -> Any:
    return transformers.CLIPTokenizer.from_pretrained(VOCABULARY, model_max_length=77)


@functools.cache
def llm_tokenizer() -> Any:
    """The same byte pairs with the padding, chat template and image tokens of a language model."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(VOCABULARY / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<pad>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=512,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class TokenizerWithPositions(transformers.PreTrainedTokenizerFast):
    """Returns position ids, as ChatGLM's tokenizer does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoding = super().__call__(*args, **kwargs)
        shape = encoding["input_ids"].shape
        encoding["position_ids"] = torch.arange(shape[1]).expand(shape)
        return encoding


@functools.cache
def chatglm_tokenizer() -> Any:
    return TokenizerWithPositions(
        tokenizer_file=str(VOCABULARY / "tokenizer.json"), pad_token="<pad>", model_max_length=256
    )


@functools.cache
def tokenizer_of_class(cls: str) -> Any:
    """The vocabulary in a tokenizer of the class ``cls``."""
    return getattr(transformers, cls).from_pretrained(VOCABULARY, pad_token="<pad>", model_max_length=64)


@functools.cache
def letter_tokenizer() -> Any:
    """A T5 tokenizer whose pieces are single characters."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.printable[:62], *string.punctuation]
    return transformers.T5Tokenizer(vocab=[(p, -float(k)) for k, p in enumerate(pieces)], model_max_length=64)


@functools.cache
def vocabulary_size() -> int:
    return len(llm_tokenizer()) + 8


def token_id(token: str) -> int:
    return llm_tokenizer().convert_tokens_to_ids(token)


def text_config(**kwargs: Any) -> dict[str, Any]:
    """Configuration of a decoder-only language model."""
    config = {
        "vocab_size": vocabulary_size(),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": token_id("<pad>"),
        "bos_token_id": token_id("<|im_start|>"),
        "eos_token_id": token_id("<|im_end|>"),
    }
    return config | kwargs


def clip_text(cls: str, **kwargs: Any) -> Any:
    ids = clip_tokenizer()
    config = {
        "vocab_size": len(ids),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
        "max_position_embeddings": 77,
        "bos_token_id": ids.bos_token_id,
        "eos_token_id": ids.eos_token_id,
        "pad_token_id": ids.pad_token_id,
    }
    return getattr(transformers, cls)(transformers.CLIPTextConfig(**(config | kwargs)))


def clip_vision(cls: str, **kwargs: Any) -> Any:
    config = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
        "image_size": 32,
        "patch_size": 8,
    }
    return getattr(transformers, cls)(transformers.CLIPVisionConfig(**(config | kwargs)))


def t5(cls: str, **kwargs: Any) -> Any:
    config_class = transformers.UMT5Config if cls.startswith("UMT5") else transformers.T5Config
    config = {
        "vocab_size": vocabulary_size(),
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": LAYERS,
        "num_heads": HEADS,
    }
    return getattr(transformers, cls)(config_class(is_encoder_decoder=False, use_cache=False, **(config | kwargs)))


def causal(cls: str, config_class: str, **kwargs: Any) -> Any:
    return getattr(transformers, cls)(getattr(transformers, config_class)(**text_config(**kwargs)))


def bert(cls: str, **kwargs: Any) -> Any:
    config = text_config()
    for name in ("head_dim", "num_key_value_heads", "bos_token_id", "eos_token_id"):
        config.pop(name)
    return getattr(transformers, cls)(transformers.BertConfig(**(config | kwargs)))


def qwen_vl(cls: str, config_class: str, text: dict[str, Any] | None = None, **vision: Any) -> Any:
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL: a language model and a vision tower."""
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default", "mrope_interleaved": "3VL" in cls}
    language_config = text_config(rope_scaling=rope, **(text or {}))
    vision_config = {"depth": 2, "hidden_size": WIDTH, "num_heads": HEADS, "patch_size": 8, "spatial_merge_size": 2}
    if "3VL" in cls:
        vision_config |= {
            "intermediate_size": 64,
            "out_hidden_size": WIDTH,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        }
    elif "2_5" in cls:
        vision_config |= {
            "intermediate_size": 64,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
            "window_size": 32,
        }
    else:
        vision_config = {
            "depth": 2,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "patch_size": 8,
            "spatial_merge_size": 2,
        }
    config = getattr(transformers, config_class)(
        text_config=language_config,
        vision_config=vision_config | vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    return getattr(transformers, cls)(config)


def qwen_processor(cls: str) -> Any:
    is_qwen3 = "3VL" in cls
    config = {"patch_size": 8, "merge_size": 2, "min_pixels": 256, "max_pixels": 4096}
    if is_qwen3:
        config = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096}}
    video = transformers.Qwen3VLVideoProcessor if is_qwen3 else transformers.Qwen2VLVideoProcessor
    return getattr(transformers, cls)(
        image_processor=transformers.Qwen2VLImageProcessor(**config),
        tokenizer=llm_tokenizer(),
        video_processor=video(),
        chat_template=TEMPLATE,
    )


def siglip_vision(cls: str = "SiglipVisionModel", **kwargs: Any) -> Any:
    config = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": 32,
        "patch_size": 8,
    }
    return getattr(transformers, cls)(transformers.SiglipVisionConfig(**(config | kwargs)))


def clap(cls: str, **kwargs: Any) -> Any:
    text = {
        "vocab_size": vocabulary_size(),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": token_id("<pad>") + 520,  # RoBERTa's positions start after the padding token
        "pad_token_id": token_id("<pad>"),
        "projection_dim": WIDTH,
    }
    if cls == "ClapTextModelWithProjection":
        return transformers.ClapTextModelWithProjection(transformers.ClapTextConfig(**(text | kwargs)))
    audio = {
        "spec_size": 64,
        "window_size": 4,
        "num_mel_bins": 64,
        "intermediate_size": 64,
        "depths": [2, 2],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "hidden_size": 192,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
        "projection_dim": WIDTH,
    }
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=WIDTH)
    return transformers.ClapModel(config)


def hifigan(**kwargs: Any) -> Any:
    config = {
        "model_in_dim": 8,
        "sampling_rate": 16000,
        "upsample_initial_channel": 16,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
        "normalize_before": False,
    }
    return transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**(config | kwargs)))


def gpt2(**kwargs: Any) -> Any:
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, n_ctx=99, n_positions=99, vocab_size=1000, max_new_tokens=8, **kwargs
    )
    return transformers.GPT2LMHeadModel(config)


def dpt(**kwargs: Any) -> Any:
    config = transformers.DPTConfig(
        image_size=32, patch_size=16, hidden_size=WIDTH, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
        num_attention_heads=HEADS, intermediate_size=64, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
        readout_type="project", is_hybrid=False,
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config)


def gemma3(cls: str = "Gemma3ForConditionalGeneration") -> Any:
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text_config(), vision_config=vision, mm_tokens_per_image=4, image_token_index=token_id("<|image_pad|>")
    )
    return getattr(transformers, cls)(config)


def t5gemma2() -> Any:
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = transformers.T5Gemma2EncoderConfig(
        text_config=text_config(dropout_rate=0.0), vision_config=vision, image_token_index=token_id("<|image_pad|>")
    )
    return transformers.T5Gemma2Encoder(config)


def mistral3(cls: str) -> Any:
    config = transformers.Mistral3Config(
        text_config=text_config(model_type="mistral"),
        vision_config={
            "model_type": "pixtral", "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "image_size": 32, "patch_size": 8, "head_dim": 8,
        },
        image_token_index=token_id("<|image_pad|>"),
    )  # fmt: skip
    return getattr(transformers, cls)(config)


def image_processor(cls: str, size: int = 32) -> Any:
    if cls.startswith("Siglip"):
        return getattr(transformers, cls)(size={"height": size, "width": size})
    if cls == "DPTImageProcessor":
        return transformers.DPTImageProcessor(size={"height": size, "width": size})
    return getattr(transformers, cls)(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def chatglm(**kwargs: Any) -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    config = {
        "num_layers": LAYERS, "padded_vocab_size": vocabulary_size(), "hidden_size": WIDTH, "ffn_hidden_size": 64,
        "kv_channels": 8,
        "num_attention_heads": HEADS, "seq_length": 256, "multi_query_attention": True, "multi_query_group_num": 2,
        "rmsnorm": True,
        "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "original_rope": True,
    }  # fmt: skip
    model = ChatGLMModel(ChatGLMConfig(**(config | kwargs)), empty_init=False)
    for weight in model.parameters():  # the class leaves its weights uninitialised
        torch.nn.init.normal_(weight, std=0.02)
    return model


def multilingual_clip() -> Any:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = {
        "numDims": WIDTH, "transformerDimensions": WIDTH, "hidden_size": WIDTH, "intermediate_size": 64,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "vocab_size": vocabulary_size(), "max_position_embeddings": token_id("<pad>") + 520,
        "pad_token_id": token_id("<pad>"),
    }  # fmt: skip
    return MultilingualCLIP(MCLIPConfig(**config))


class AlwaysSafe(torch.nn.Module):
    """Replaces the guardrail of Cosmos, whose weights are not available, and accepts all content."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def siglip2_vision() -> Any:
    config = transformers.Siglip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_patches=16,
        patch_size=8,
    )
    return transformers.Siglip2VisionModel(config)


def qwen_vl_text() -> Any:
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    return transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**text_config(rope_scaling=rope)))


CLIP = "CLIPTextModel CLIPTextModelWithProjection"
ENCODERS: dict[str, Any] = {
    **{name: functools.partial(clip_text, name) for name in CLIP.split()},
    **{name: functools.partial(clip_vision, name) for name in ("CLIPVisionModel", "CLIPVisionModelWithProjection")},
    **{name: functools.partial(t5, name) for name in ("T5EncoderModel", "UMT5EncoderModel")},
    "BertModel": functools.partial(bert, "BertModel"),
    "LlamaModel": functools.partial(causal, "LlamaModel", "LlamaConfig"),
    "LlamaForCausalLM": functools.partial(causal, "LlamaForCausalLM", "LlamaConfig"),
    "GlmModel": functools.partial(causal, "GlmModel", "GlmConfig", partial_rotary_factor=0.5),
    "Gemma2PreTrainedModel": functools.partial(causal, "Gemma2Model", "Gemma2Config"),
    "GemmaPreTrainedModel": functools.partial(causal, "GemmaModel", "GemmaConfig"),
    "Qwen3Model": functools.partial(causal, "Qwen3Model", "Qwen3Config"),
    "Qwen3ForCausalLM": functools.partial(causal, "Qwen3ForCausalLM", "Qwen3Config"),
    "SmolLM3ForCausalLM": functools.partial(causal, "SmolLM3ForCausalLM", "SmolLM3Config"),
    "Qwen2_5_VLForConditionalGeneration": functools.partial(
        qwen_vl, "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"
    ),
    "Qwen2VLForConditionalGeneration": functools.partial(qwen_vl, "Qwen2VLForConditionalGeneration", "Qwen2VLConfig"),
    "Qwen3VLForConditionalGeneration": functools.partial(qwen_vl, "Qwen3VLForConditionalGeneration", "Qwen3VLConfig"),
    "Qwen3VLModel": functools.partial(qwen_vl, "Qwen3VLModel", "Qwen3VLConfig"),
    "Mistral3ForConditionalGeneration": functools.partial(mistral3, "Mistral3ForConditionalGeneration"),
    "Mistral3Model": functools.partial(mistral3, "Mistral3Model"),
    "CosmosSafetyChecker": AlwaysSafe,
    "Siglip2VisionModel": siglip2_vision,
    "Qwen2_5_VLTextModel": qwen_vl_text,
    "ChatGLMModel": chatglm,
    "MultilingualCLIP": multilingual_clip,
    "Gemma3ForConditionalGeneration": gemma3,
    "T5Gemma2Encoder": t5gemma2,
    "SiglipVisionModel": siglip_vision,
    "ClapModel": functools.partial(clap, "ClapModel"),
    "ClapTextModelWithProjection": functools.partial(clap, "ClapTextModelWithProjection"),
    "SpeechT5HifiGan": hifigan,
    "GPT2LMHeadModel": gpt2,
    "DPTForDepthEstimation": dpt,
}
PROCESSORS: dict[str, Any] = {
    **{
        n: functools.partial(image_processor, n)
        for n in ("CLIPImageProcessor", "SiglipImageProcessor", "DPTImageProcessor")
    },
    **{n: functools.partial(qwen_processor, n) for n in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")},
    "CLIPTokenizer": clip_tokenizer,
    "ClapFeatureExtractor": transformers.ClapFeatureExtractor,
    "CLIPProcessor": lambda: transformers.CLIPProcessor(image_processor("CLIPImageProcessor"), clip_tokenizer()),
}
TOKENIZERS = (
    "T5Tokenizer", "T5TokenizerFast", "AutoTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "LlamaTokenizer",
    "BertTokenizer",
    "ByT5Tokenizer", "TokenizersBackend", "PreTrainedTokenizerBase", "RobertaTokenizer", "PythonBackend", "AutoProcessor",
    "ChatGLMTokenizer", "XLMRobertaTokenizer", "GemmaTokenizerFast",
)  # fmt: skip
PROCESSORS |= dict.fromkeys(TOKENIZERS, llm_tokenizer) | {
    "ChatGLMTokenizer": chatglm_tokenizer,
    "RobertaTokenizer": functools.partial(tokenizer_of_class, "RobertaTokenizer"),
    "T5Letters": letter_tokenizer,
}
