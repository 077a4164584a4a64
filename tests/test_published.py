"""
The published config.json of the families: each must give the architecture that is known of its model. The
oracle is the fields beside each file, written by hand from model cards and papers; both transformers
libraries are asked for what they write, and every family that is out of scope must say why.

The files are here without the parts that nobody reads, and the factors of longrope are round.
"""

import dataclasses
import json
import math
import os
import subprocess

import pytest
import torch
from lib.families import FAMILIES
from lib.keys import HARMLESS, HARMLESS_AT, OUT_OF_SCOPE, OUT_OF_SCOPE_KEYS
from lib.origin import parse_config
from lib.rope import Rope, frequencies
from model import GPTConfig

# -----------------------------------------------------------------------------
# what the files of many models have in common, in their words and in ours

NOTES = {"initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True,
         "torch_dtype": "bfloat16", "transformers_version": "4.40.0"}
OURS = {"position": "rope", "norm": "rms", "norm_eps": 1e-5, "activation": "silu", "gated": True, "bias": "",
        "tied": False}
PUBLISHED = {}


def sizes(n_layer, n_head, n_embd, n_ffn, n_kv_head=None):
    """The keys in which the sizes of a family differ."""
    keys = {"num_hidden_layers": n_layer, "num_attention_heads": n_head, "hidden_size": n_embd,
            "intermediate_size": n_ffn}
    return keys | ({"num_key_value_heads": n_kv_head} if n_kv_head else {})


def add(name, shape, content, **fields):
    """A published file whose sizes are (layers, heads, width, width of the FFN, heads of keys and values)."""
    expected = dict(zip(("n_layer", "n_head", "n_embd", "n_ffn", "n_kv_head"), shape))
    PUBLISHED[name] = NOTES | sizes(*shape) | content, OURS | expected | fields


def settled(config):
    """A GPTConfig in which each thing is said in one way."""
    without = set() if config.gated else {"gate"}
    whole = {"n_kv_head": config.kv_heads, "n_ffn": config.d_ffn, "head_dim": config.d_head,
             "attention_scale": config.attention_scale or config.d_head**-0.5,
             "bias": " ".join(sorted(set(config.bias.split()) - without))}
    return dataclasses.replace(config, **whole)


# -----------------------------------------------------------------------------
# GPT-2 and OPT

GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "vocab_size": 50257, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
GPT2_LATER = GPT2 | {"n_special": 0, "predict_special_tokens": True}

for name, content, shape in (
        ("gpt2", GPT2, (12, 12, 768)), ("gpt2-medium", GPT2_LATER, (24, 16, 1024)),
        ("gpt2-large", GPT2 | {"output_past": True}, (36, 20, 1280)),
        ("gpt2-xl", GPT2 | {"output_past": True}, (48, 25, 1600)),
        ("distilgpt2", GPT2 | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
         (6, 12, 768))):
    keys = dict(zip(("n_layer", "n_head", "n_embd"), shape))
    PUBLISHED[name] = content | keys, keys
PUBLISHED["cerebras-gpt-111m"] = (
    GPT2 | {"activation_function": "gelu", "n_embd": 768, "n_head": 12, "n_layer": 10, "n_inner": 3072,
            "n_positions": 2048, "reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False,
            "scale_attn_weights": True, "use_cache": True},
    {"activation": "gelu", "n_layer": 10, "block_size": 2048})

OPT = {
    "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1,
    "eos_token_id": 2, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
    "model_type": "opt", "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272}
OPT_LATER = {"_remove_final_layer_norm": False, "unk_token_id": 3}

for name, (n_layer, n_head, n_embd) in {
        "opt-125m": (12, 12, 768), "opt-1.3b": (24, 32, 2048), "opt-2.7b": (32, 32, 2560),
        "opt-6.7b": (32, 32, 4096), "opt-13b": (40, 40, 5120), "opt-30b": (48, 56, 7168),
        "opt-66b": (64, 72, 9216)}.items():
    keys = {"num_hidden_layers": n_layer, "num_attention_heads": n_head, "hidden_size": n_embd,
            "ffn_dim": 4 * n_embd, "word_embed_proj_dim": n_embd}
    PUBLISHED[name] = (
        OPT | keys | (OPT_LATER if name != "opt-125m" else {}),
        {"vocab_size": 50272, "block_size": 2048, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd,
         "position_offset": 2, "activation": "relu"})

# -----------------------------------------------------------------------------
# Llama and those who kept its name

LLAMA = {
    "_name_or_path": "meta-llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
    "model_type": "llama", "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": 32000}
LLAMA1 = LLAMA | {"max_position_embeddings": 2048, "max_sequence_length": 2048, "rms_norm_eps": 1e-06,
                  "pad_token_id": 0}
LLAMA2 = LLAMA | {"max_position_embeddings": 4096, "pretraining_tp": 1, "rope_scaling": None}
LLAMA3 = LLAMA | {"attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
                  "rope_scaling": None, "rope_theta": 500000.0, "max_position_embeddings": 8192,
                  "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001}
SCALING = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
           "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA31 = LLAMA3 | {"mlp_bias": False, "max_position_embeddings": 131072, "rope_scaling": SCALING}
INSTRUCTED = {"eos_token_id": [128001, 128008, 128009]}
LLAMA32 = LLAMA31 | {"tie_word_embeddings": True, "rope_scaling": SCALING | {"factor": 32.0}}
ROPE31 = Rope(theta=5e5, scaling="llama3", factor=8.0, original=8192, slow=1.0, fast=4.0)
OURS1 = {"vocab_size": 32000, "block_size": 2048, "norm_eps": 1e-6}
OURS2 = {"vocab_size": 32000, "block_size": 4096}
OURS31 = {"vocab_size": 128256, "block_size": 131072, "rope": ROPE31}
OURS32 = OURS31 | {"rope": dataclasses.replace(ROPE31, factor=32.0), "tied": True}

add("llama-7b", (32, 32, 4096, 11008), LLAMA1, **OURS1)
add("llama-13b", (40, 40, 5120, 13824), LLAMA1, **OURS1)
add("llama-30b", (60, 52, 6656, 17920), LLAMA1, **OURS1)
add("llama-65b", (80, 64, 8192, 22016), LLAMA1 | {"rms_norm_eps": 1e-05}, **OURS1 | {"norm_eps": 1e-5})
add("llama-2-7b", (32, 32, 4096, 11008, 32), LLAMA2, **OURS2)
add("llama-2-13b", (40, 40, 5120, 13824, 40), LLAMA2, **OURS2)
add("llama-2-70b", (80, 64, 8192, 28672, 8), LLAMA2, **OURS2)
add("llama-3-8b", (32, 32, 4096, 14336, 8), LLAMA3, vocab_size=128256, block_size=8192, rope=Rope(theta=5e5))
add("llama-3.1-8b", (32, 32, 4096, 14336, 8), LLAMA31, **OURS31)
add("llama-3.1-70b-instruct", (80, 64, 8192, 28672, 8), LLAMA31 | INSTRUCTED, **OURS31)
add("llama-3.1-405b", (126, 128, 16384, 53248, 8), LLAMA31, **OURS31)
add("llama-3.2-1b", (16, 32, 2048, 8192, 8), LLAMA32 | {"head_dim": 64}, **OURS32)
add("llama-3.2-3b-instruct", (28, 24, 3072, 8192, 8), LLAMA32 | INSTRUCTED | {"head_dim": 128}, **OURS32)
add("llama-3.3-70b-instruct", (80, 64, 8192, 28672, 8), LLAMA31 | INSTRUCTED | {"head_dim": 128}, **OURS31)
UNSLOTH = {"unsloth_fixed": True, "unsloth_version": "2025.3.9", "pad_token_id": 128004}
add("unsloth/llama-3.2-1b-instruct", (16, 32, 2048, 8192, 8), LLAMA32 | UNSLOTH | {"head_dim": 64}, **OURS32)

CODE_LLAMA = LLAMA2 | {"rope_theta": 1000000, "max_position_embeddings": 16384}
add("codellama-7b", (32, 32, 4096, 11008, 32), CODE_LLAMA | {"vocab_size": 32016},
    vocab_size=32016, block_size=16384, rope=Rope(theta=1e6))
add("codellama-34b", (48, 64, 8192, 22016, 8), CODE_LLAMA, vocab_size=32000, block_size=16384,
    rope=Rope(theta=1e6))
add("tinyllama-1.1b-chat", (22, 32, 2048, 5632, 4),
    LLAMA2 | {"attention_bias": False, "max_position_embeddings": 2048, "rope_theta": 10000.0},
    vocab_size=32000, block_size=2048)
YI = LLAMA2 | {"vocab_size": 64000, "rope_theta": 5000000.0, "pad_token_id": 0}
add("yi-6b", (32, 32, 4096, 11008, 4), YI, vocab_size=64000, block_size=4096, rope=Rope(theta=5e6))
add("yi-34b", (60, 56, 7168, 20480, 8), YI, vocab_size=64000, block_size=4096, rope=Rope(theta=5e6))
add("vicuna-7b-v1.5-16k", (32, 32, 4096, 11008, 32),
    LLAMA2 | {"rope_scaling": {"factor": 4.0, "type": "linear"}}, vocab_size=32000, block_size=4096,
    rope=Rope(scaling="linear", factor=4.0))

SMOLLM2 = LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    "is_llama_config": True, "initializer_range": 0.041666666666666664, "max_position_embeddings": 8192,
    "pretraining_tp": 1, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "vocab_size": 49152}
SMOLLM2_CHAT = SMOLLM2 | {
    "mlp_bias": False, "pad_token_id": 2, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}
OURS_SMOLLM2 = {"vocab_size": 49152, "block_size": 8192, "tied": True, "rope": Rope(theta=1e5)}
add("smollm2-135m", (30, 9, 576, 1536, 3), SMOLLM2, **OURS_SMOLLM2)
add("smollm2-135m-instruct", (30, 9, 576, 1536, 3), SMOLLM2_CHAT, **OURS_SMOLLM2)
add("smollm2-360m", (32, 15, 960, 2560, 5), SMOLLM2, **OURS_SMOLLM2)
add("smollm2-360m-instruct", (32, 15, 960, 2560, 5), SMOLLM2_CHAT, **OURS_SMOLLM2)
add("smollm2-1.7b", (24, 32, 2048, 8192, 32), SMOLLM2 | {"rope_theta": 130000},
    **OURS_SMOLLM2 | {"rope": Rope(theta=1.3e5)})
add("smollm2-1.7b-instruct", (24, 32, 2048, 8192, 32), SMOLLM2_CHAT | {"rope_theta": 130000},
    **OURS_SMOLLM2 | {"rope": Rope(theta=1.3e5)})
add("unsloth/smollm2-135m", (30, 9, 576, 1536, 3), SMOLLM2 | UNSLOTH, **OURS_SMOLLM2)

# -----------------------------------------------------------------------------
# Mistral

MISTRAL = {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "max_position_embeddings": 32768,
    "model_type": "mistral", "rms_norm_eps": 1e-05, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 32000}
SEVEN = (32, 32, 4096, 14336, 8)
# The file of Mistral-7B-Instruct-v0.3, as an early transformers wrote all of it.
EVERYTHING = {
    "attention_dropout": 0.0, "return_dict": True, "output_hidden_states": False, "output_attentions": False,
    "torchscript": False, "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {},
    "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False,
    "cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False,
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
    "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "tokenizer_class": None, "prefix": None, "pad_token_id": None, "sep_token_id": None,
    "decoder_start_token_id": None, "task_specific_params": None, "problem_type": None,
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.3"}

add("mistral-7b-v0.1", SEVEN, MISTRAL | {"sliding_window": 4096, "rope_theta": 10000.0},
    vocab_size=32000, block_size=32768, windows=(4096,) * 32)
add("mistral-7b-instruct-v0.2", SEVEN, MISTRAL | {"rope_theta": 1000000.0, "attention_dropout": 0.0},
    vocab_size=32000, block_size=32768, rope=Rope(theta=1e6))
add("mistral-7b-instruct-v0.3", SEVEN, MISTRAL | EVERYTHING | {"rope_theta": 1000000.0, "vocab_size": 32768},
    vocab_size=32768, block_size=32768, rope=Rope(theta=1e6))
add("mistral-nemo-2407", (40, 32, 5120, 14336, 8),
    MISTRAL | {"head_dim": 128, "rope_theta": 1000000.0, "vocab_size": 131072,
               "max_position_embeddings": 131072},
    vocab_size=131072, block_size=131072, head_dim=128, rope=Rope(theta=1e6))
add("mistral-small-24b-2501", (40, 32, 5120, 32768, 8),
    MISTRAL | {"head_dim": 128, "rope_theta": 100000000.0, "vocab_size": 131072},
    vocab_size=131072, block_size=32768, head_dim=128, rope=Rope(theta=1e8))
# A window as long as the context hides nothing.
add("ministral-8b-instruct-2410", (36, 32, 4096, 12288, 8),
    MISTRAL | {"head_dim": 128, "rope_theta": 100000000.0, "vocab_size": 131072, "sliding_window": 32768},
    vocab_size=131072, block_size=32768, head_dim=128, rope=Rope(theta=1e8))
# The same model as transformers 5 knows it, by its real layers.
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 9
add("ministral-8b-instruct-2410 of transformers 5", (36, 32, 4096, 12288, 8),
    MISTRAL | {"head_dim": 128, "vocab_size": 131072, "sliding_window": 32768, "layer_types": MIXED,
               "max_position_embeddings": 131072, "model_type": "ministral",
               "architectures": ["MinistralForCausalLM"],
               "rope_parameters": {"rope_theta": 100000000.0, "rope_type": "default"}},
    vocab_size=131072, block_size=131072, head_dim=128, rope=Rope(theta=1e8),
    windows=(0, 32768, 32768, 32768) * 9)

# Beyond the original context queries grow with the position, which is why the context ends there.
VISION = {"attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024,
          "image_size": 1540, "model_type": "pixtral", "num_attention_heads": 16, "num_hidden_layers": 24,
          "patch_size": 14}
DEVSTRAL_ROPE = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 48.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 8192, "rope_theta": 100000000.0,
    "rope_type": "yarn", "type": "yarn"}
DEVSTRAL_TEXT = sizes(40, 32, 5120, 32768, 8) | {
    "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 393216, "model_type": "ministral3", "rms_norm_eps": 1e-05,
    "rope_parameters": DEVSTRAL_ROPE, "sliding_window": None, "use_cache": True, "vocab_size": 131072}
DEVSTRAL = {
    "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16", "image_token_index": 10,
    "model_type": "mistral3", "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "tie_word_embeddings": False, "spatial_merge_size": 2, "text_config": DEVSTRAL_TEXT,
    "vision_config": VISION, "transformers_version": "5.0.0.dev0", "vision_feature_layer": -1}
YARN = Rope(theta=1e8, scaling="yarn", factor=48.0, original=8192, slow=1.0, fast=32.0, magnitude=1.0)
PUBLISHED["devstral-small-2-24b"] = (
    DEVSTRAL, OURS | {"n_layer": 40, "n_head": 32, "n_embd": 5120, "n_ffn": 32768, "n_kv_head": 8,
                      "head_dim": 128, "vocab_size": 131072, "block_size": 8192, "rope": YARN})
MINISTRAL3_ROPE = DEVSTRAL_ROPE | {"factor": 16.0, "original_max_position_embeddings": 16384,
                                   "rope_theta": 1000000.0}
MINISTRAL3_TEXT = DEVSTRAL_TEXT | sizes(26, 32, 3072, 9216, 8) | {
    "max_position_embeddings": 262144, "rope_parameters": MINISTRAL3_ROPE, "tie_word_embeddings": True}
PUBLISHED["ministral-3-3b-base-2512"] = (
    DEVSTRAL | {"text_config": MINISTRAL3_TEXT, "tie_word_embeddings": True},
    OURS | {"n_layer": 26, "n_head": 32, "n_embd": 3072, "n_ffn": 9216, "n_kv_head": 8, "head_dim": 128,
            "vocab_size": 131072, "block_size": 16384, "tied": True,
            "rope": dataclasses.replace(YARN, theta=1e6, factor=16.0, original=16384)})
PUBLISHED["mistral-small-3.1-24b"] = (
    DEVSTRAL | {"text_config": NOTES | MISTRAL | sizes(40, 32, 5120, 32768, 8) | {
        "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 1000000000.0,
        "vocab_size": 131072}},
    OURS | {"n_layer": 40, "n_head": 32, "n_embd": 5120, "n_ffn": 32768, "n_kv_head": 8, "head_dim": 128,
            "vocab_size": 131072, "block_size": 131072, "rope": Rope(theta=1e9)})

# -----------------------------------------------------------------------------
# Qwen

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
    "max_window_layers": 28, "max_position_embeddings": 131072, "model_type": "qwen2",
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 152064, "bos_token_id": 151643, "eos_token_id": 151643}
QWEN25 = QWEN2 | {"use_mrope": False}
SMALL = {"max_position_embeddings": 32768, "sliding_window": 32768, "tie_word_embeddings": True,
         "vocab_size": 151936}
CHAT = {"max_position_embeddings": 32768, "eos_token_id": 151645}
STRETCHED = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
YARN4 = Rope(theta=1e6, scaling="yarn", factor=4.0, original=32768, slow=1.0, fast=32.0,
             magnitude=0.1 * math.log(4) + 1)
OURS_QWEN2 = {"vocab_size": 152064, "block_size": 131072, "norm_eps": 1e-6, "bias": "q k v",
              "rope": Rope(theta=1e6)}
OURS_SMALL = OURS_QWEN2 | {"vocab_size": 151936, "block_size": 32768, "tied": True}

add("qwen2-7b", (28, 28, 3584, 18944, 4), QWEN2, **OURS_QWEN2)
add("qwen2.5-0.5b", (24, 14, 896, 4864, 2), QWEN25 | SMALL | {"max_window_layers": 24}, **OURS_SMALL)
add("qwen2.5-1.5b", (28, 12, 1536, 8960, 2), QWEN25 | SMALL | {"max_position_embeddings": 131072},
    **OURS_SMALL | {"block_size": 131072})
add("qwen2.5-3b", (36, 16, 2048, 11008, 2), QWEN25 | SMALL | {"max_window_layers": 36}, **OURS_SMALL)
add("qwen2.5-7b", (28, 28, 3584, 18944, 4), QWEN25, **OURS_QWEN2)
add("qwen2.5-7b-instruct", (28, 28, 3584, 18944, 4), QWEN2 | CHAT, **OURS_QWEN2 | {"block_size": 32768})
add("qwen2.5-7b-instruct with yarn", (28, 28, 3584, 18944, 4), QWEN2 | CHAT | STRETCHED,
    **OURS_QWEN2 | {"block_size": 32768, "rope": YARN4})
add("qwen2.5-14b", (48, 40, 5120, 13824, 8), QWEN25 | {"rms_norm_eps": 1e-05, "max_window_layers": 48},
    **OURS_QWEN2 | {"norm_eps": 1e-5})
add("qwen2.5-32b-instruct", (64, 40, 5120, 27648, 8), QWEN2 | CHAT | {"max_window_layers": 70},
    **OURS_QWEN2 | {"block_size": 32768})
add("qwen2.5-72b-instruct", (80, 64, 8192, 29568, 8), QWEN2 | CHAT | {"max_window_layers": 70},
    **OURS_QWEN2 | {"block_size": 32768})
add("unsloth/qwen2.5-0.5b-instruct", (24, 14, 896, 4864, 2),
    QWEN2 | SMALL | CHAT | UNSLOTH | {"sliding_window": None, "rope_scaling": None}, **OURS_SMALL)
# Where the switch is on, the layers from max_window_layers on see a window.
add("qwen2 with windows", (6, 4, 64, 128, 2),
    QWEN2 | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 4},
    **OURS_QWEN2 | {"windows": (0, 0, 0, 0, 512, 512)})

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936, "bos_token_id": 151643,
    "eos_token_id": 151645}
BASE3 = {"max_position_embeddings": 32768, "eos_token_id": 151643}
STRETCHED3 = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
OURS_QWEN3 = {"vocab_size": 151936, "block_size": 40960, "norm_eps": 1e-6, "head_dim": 128, "qk_norm": "head",
              "rope": Rope(theta=1e6)}
TIED = {"tie_word_embeddings": True}
EIGHT = (36, 32, 4096, 12288, 8)

add("qwen3-0.6b", (28, 16, 1024, 3072, 8), QWEN3 | TIED | {"max_window_layers": 28}, **OURS_QWEN3,
    **{"tied": True})
add("qwen3-1.7b-base", (28, 16, 2048, 6144, 8), QWEN3 | TIED | BASE3,
    **OURS_QWEN3 | {"block_size": 32768, "tied": True})
add("qwen3-4b", (36, 32, 2560, 9728, 8), QWEN3 | TIED, **OURS_QWEN3 | {"tied": True})
add("qwen3-4b-instruct-2507", (36, 32, 2560, 9728, 8),
    QWEN3 | TIED | {"max_position_embeddings": 262144, "rope_theta": 5000000},
    **OURS_QWEN3 | {"tied": True, "block_size": 262144, "rope": Rope(theta=5e6)})
add("qwen3-8b", EIGHT, QWEN3, **OURS_QWEN3)
add("qwen3-8b-base", EIGHT, QWEN3 | BASE3, **OURS_QWEN3 | {"block_size": 32768})
add("qwen3-8b with yarn", EIGHT, QWEN3 | STRETCHED3, **OURS_QWEN3 | {"rope": YARN4})
add("qwen3-8b with yarn and a longer context", EIGHT,
    QWEN3 | STRETCHED3 | {"max_position_embeddings": 131072},
    **OURS_QWEN3 | {"rope": YARN4, "block_size": 131072})
add("qwen3-14b", (40, 40, 5120, 17408, 8), QWEN3 | {"max_window_layers": 40}, **OURS_QWEN3)
add("qwen3-32b", (64, 64, 5120, 25600, 8), QWEN3 | {"max_window_layers": 64}, **OURS_QWEN3)
add("unsloth/qwen3-8b", EIGHT, QWEN3 | UNSLOTH, **OURS_QWEN3)

# -----------------------------------------------------------------------------
# Phi

AUTO = {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                     "AutoModelForCausalLM": "modeling_phi3.Phi3"}}
PHI3 = AUTO | {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "embd_pdrop": 0.0, "hidden_act": "silu", "max_position_embeddings": 4096, "model_type": "phi3",
    "pad_token_id": 32000, "original_max_position_embeddings": 4096, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
    "tie_word_embeddings": False, "vocab_size": 32064}
LONG, SHORT = [1.0 + i for i in range(48)], [1.0 + i / 50 for i in range(48)]
LONGROPE = {"rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
            "max_position_embeddings": 131072, "sliding_window": 262144}
GROWN = math.sqrt(1 + math.log(32) / math.log(4096))     # Ding et al. 2024: a context that grew 32 times
OURS_PHI3 = {"vocab_size": 32064, "block_size": 4096}
# The frequencies are those of the first 4096 tokens, so the context ends there.
OURS_128K = OURS_PHI3 | {"rope": Rope(scaling="longrope", factor=32.0, original=4096, factors=tuple(SHORT),
                                      magnitude=GROWN)}
MINI = (32, 32, 3072, 8192, 32)

add("phi-3-mini-4k-instruct", MINI, PHI3, **OURS_PHI3, **{"windows": (2047,) * 32})
add("phi-3-mini-128k-instruct", MINI, PHI3 | LONGROPE, **OURS_128K)
add("phi-3-mini-128k-instruct of april 2024", MINI,
    PHI3 | LONGROPE | {"rope_scaling": LONGROPE["rope_scaling"] | {"type": "su"}}, **OURS_128K)
add("phi-3.5-mini-instruct", MINI, PHI3 | LONGROPE, **OURS_128K)
add("phi-3-medium-4k-instruct", (40, 40, 5120, 17920, 10), PHI3, **OURS_PHI3, **{"windows": (2047,) * 40})
add("phi-4", (40, 40, 5120, 17920, 10),
    PHI3 | {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384,
            "rope_theta": 250000.0, "sliding_window": None, "vocab_size": 100352, "pad_token_id": 100349},
    vocab_size=100352, block_size=16384, rope=Rope(theta=2.5e5))
PHI4_LONG = [1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897] + [32.0] * 42
add("phi-4-mini-instruct", (32, 24, 3072, 8192, 8),
    PHI3 | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
            "max_position_embeddings": 131072, "partial_rotary_factor": 0.75, "sliding_window": 262144,
            "rope_scaling": {"long_factor": PHI4_LONG, "short_factor": [1.0] * 48, "type": "longrope"},
            "tie_word_embeddings": True, "vocab_size": 200064, "pad_token_id": 199999},
    vocab_size=200064, block_size=4096, tied=True,
    rope=Rope(dim=96, scaling="longrope", factor=32.0, original=4096, factors=(1.0,) * 48, magnitude=GROWN))

# -----------------------------------------------------------------------------
# SmolLM3, Gemma, OLMo

NO_ROPE = [1, 1, 1, 0] * 9
add("smollm3-3b", (36, 16, 2048, 11008, 4),
    {"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
     "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu",
     "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
     "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": NO_ROPE,
     "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
     "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256},
    vocab_size=128256, block_size=65536, norm_eps=1e-6, tied=True, rope=Rope(theta=5e6),
    unrotated=tuple(range(3, 36, 4)))

GEMMA = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 256,
    "hidden_act": "gelu", "hidden_activation": None, "max_position_embeddings": 8192, "model_type": "gemma",
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
    "vocab_size": 256000}
OURS_GEMMA = {"vocab_size": 256000, "block_size": 8192, "norm_eps": 1e-6, "head_dim": 256, "norm_offset": 1.0,
              "activation": "gelu_tanh", "tied": True}
add("gemma-2b", (18, 8, 2048, 16384, 1), GEMMA, **OURS_GEMMA, **{"embed_scale": math.sqrt(2048)})
add("gemma-7b", (28, 16, 3072, 24576, 16), GEMMA, **OURS_GEMMA, **{"embed_scale": math.sqrt(3072)})
add("gemma-1.1-2b-it", (18, 8, 2048, 16384, 1), GEMMA | {"hidden_activation": "gelu_pytorch_tanh"},
    **OURS_GEMMA, **{"embed_scale": math.sqrt(2048)})

GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": 256, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "vocab_size": 262144}
SIX = ["sliding_attention"] * 5 + ["full_attention"]
TINY3 = {"_sliding_window_pattern": 6, "layer_types": SIX * 3, "rope_local_base_freq": 10000.0,
         "rope_theta": 1000000.0, "use_bidirectional_attention": False}
OURS_GEMMA3 = OURS_GEMMA | {"vocab_size": 262144, "block_size": 32768, "norm_place": "both",
                            "qk_norm": "head", "rope": Rope(theta=1e6), "local_rope": Rope(theta=1e4)}
OURS_LARGE3 = OURS_GEMMA3 | {"vocab_size": 262208, "block_size": 131072,
                             "rope": Rope(theta=1e6, scaling="linear", factor=8.0)}


def local(window, n_layer):
    """Windows in all layers but each sixth."""
    return tuple(0 if i % 6 == 5 else window for i in range(n_layer))


WITHOUT_PATTERN = {key: value for key, value in GEMMA3.items() if key != "sliding_window_pattern"}
add("gemma-3-270m", (18, 4, 640, 2048, 1), WITHOUT_PATTERN | TINY3,
    **OURS_GEMMA3, **{"windows": local(512, 18), "embed_scale": math.sqrt(640)})
add("gemma-3-1b-pt", (26, 4, 1152, 6912, 1), GEMMA3,
    **OURS_GEMMA3, **{"windows": local(512, 26), "embed_scale": math.sqrt(1152)})

WRAPPER = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
    "mm_tokens_per_image": 256, "model_type": "gemma3", "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "patch_size": 14,
                      "model_type": "siglip_vision_model", "num_attention_heads": 16,
                      "num_hidden_layers": 27}}
SHORT3 = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
          "sliding_window": 1024}


def add_wrapped(name, shape, text, wrapper=WRAPPER, **fields):
    """A file whose text_config is as short as it was published: it leaves out what transformers assumes."""
    expected = dict(zip(("n_layer", "n_head", "n_embd", "n_ffn", "n_kv_head"), shape))
    more = {"windows": local(1024, shape[0]), "embed_scale": math.sqrt(shape[2])}
    PUBLISHED[name] = wrapper | {"text_config": SHORT3 | text}, OURS | OURS_LARGE3 | expected | more | fields


SHORT4 = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
add_wrapped("gemma-3-4b-pt", (34, 8, 2560, 10240, 4), SHORT4)
add_wrapped("gemma-3-12b-pt", (48, 16, 3840, 15360, 8), sizes(48, 16, 3840, 15360, 8))
add_wrapped("gemma-3-27b-it", (62, 32, 5376, 21504, 16),
            sizes(62, 32, 5376, 21504, 16) | {"head_dim": 128, "query_pre_attn_scalar": 168},
            head_dim=128, attention_scale=168**-0.5)
add_wrapped("unsloth/gemma-3-4b-it", (34, 8, 2560, 10240, 4),
            GEMMA3 | SHORT3 | sizes(34, 8, 2560, 10240, 4)
            | {"vocab_size": 262208, "max_position_embeddings": 131072},
            WRAPPER | {"unsloth_fixed": True})

OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "hidden_act": "silu", "max_position_embeddings": 4096, "model_type": "olmo2", "pad_token_id": 100277,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
    "vocab_size": 100352}
OURS_OLMO2 = {"vocab_size": 100352, "block_size": 4096, "norm_eps": 1e-6, "norm_place": "after",
              "qk_norm": "width", "rope": Rope(theta=5e5)}
add("olmo-2-1b", (16, 16, 2048, 8192, 16), OLMO2, **OURS_OLMO2)
add("olmo-2-7b", (32, 32, 4096, 11008, 32), OLMO2, **OURS_OLMO2)
add("olmo-2-13b", (40, 40, 5120, 13824, 40), OLMO2, **OURS_OLMO2)
add("olmo-2-32b", (64, 40, 5120, 27648, 8), OLMO2, **OURS_OLMO2)
OLMO3 = OLMO2 | {
    "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "max_position_embeddings": 65536,
    "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
                     "original_max_position_embeddings": 8192, "rope_type": "yarn"},
    "sliding_window": 4096, "vocab_size": 100278}
FOUR = ["sliding_attention"] * 3 + ["full_attention"]
OURS_OLMO3 = OURS_OLMO2 | {
    "vocab_size": 100278, "block_size": 65536, "local_rope": Rope(theta=5e5),
    "rope": Rope(theta=5e5, scaling="yarn", factor=8.0, original=8192, slow=1.0, fast=32.0,
                 magnitude=1.2079441541679836)}
add("olmo-3-7b", (32, 32, 4096, 11008, 32), OLMO3 | {"layer_types": FOUR * 8},
    **OURS_OLMO3, **{"windows": (4096, 4096, 4096, 0) * 8})
add("olmo-3.1-32b-instruct", (64, 40, 5120, 27648, 8), OLMO3 | {"layer_types": FOUR * 16},
    **OURS_OLMO3, **{"windows": (4096, 4096, 4096, 0) * 16})

# -----------------------------------------------------------------------------
# Granite, StarCoder2, InternLM3, Seed-OSS, Arcee

GRANITE = {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu",
    "logits_scaling": 8.0, "max_position_embeddings": 4096, "mlp_bias": False, "model_type": "granite",
    "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "vocab_size": 49155}
GRANITE8 = GRANITE | {"attention_multiplier": 0.0078125, "logits_scaling": 16.0}
LONGER = {"max_position_embeddings": 131072, "rope_theta": 10000000.0}
OURS_GRANITE = {"vocab_size": 49155, "block_size": 4096, "tied": True, "embed_scale": 12.0,
                "residual_scale": 0.22, "attention_scale": 1 / 64, "logit_scale": 1 / 8}
OURS_GRANITE8 = OURS_GRANITE | {"attention_scale": 1 / 128, "logit_scale": 1 / 16}
add("granite-3.0-2b-base", (40, 32, 2048, 8192, 8), GRANITE, **OURS_GRANITE)
add("granite-3.1-2b-instruct", (40, 32, 2048, 8192, 8), GRANITE | LONGER | {"rope_theta": 5000000.0},
    **OURS_GRANITE | {"block_size": 131072, "rope": Rope(theta=5e6)})
add("granite-3.0-8b-base", (40, 32, 4096, 12800, 8), GRANITE8, **OURS_GRANITE8)
add("granite-3.3-8b-instruct", (40, 32, 4096, 12800, 8), GRANITE8 | LONGER | {"vocab_size": 49159},
    **OURS_GRANITE8 | {"vocab_size": 49159, "block_size": 131072, "rope": Rope(theta=1e7)})

STARCODER2 = {
    "activation_function": "gelu_pytorch_tanh", "architectures": ["Starcoder2ForCausalLM"],
    "attention_dropout": 0.1, "attention_softmax_in_fp32": True, "embedding_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-05, "max_position_embeddings": 16384,
    "mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
    "residual_dropout": 0.1, "scale_attn_weights": True, "scale_attention_softmax_in_fp32": True,
    "sliding_window": 4096, "use_bias": True, "vocab_size": 49152}
OURS_STARCODER2 = {"vocab_size": 49152, "block_size": 16384, "norm": "layer", "activation": "gelu_tanh",
                   "gated": False, "bias": "q k v out up down norm", "tied": True}
add("starcoder2-3b", (30, 24, 3072, 12288, 2), STARCODER2 | {"rope_theta": 999999.4420358813},
    **OURS_STARCODER2, **{"windows": (4096,) * 30, "rope": Rope(theta=999999.4420358813)})
add("starcoder2-7b", (32, 36, 4608, 18432, 4), STARCODER2 | {"rope_theta": 1000000},
    **OURS_STARCODER2, **{"windows": (4096,) * 32, "rope": Rope(theta=1e6)})
add("starcoder2-15b", (40, 48, 6144, 24576, 4), STARCODER2 | {"rope_theta": 100000},
    **OURS_STARCODER2, **{"windows": (4096,) * 40, "rope": Rope(theta=1e5)})

# A dynamic scaling changes nothing within the context.
add("internlm3-8b-instruct", (48, 32, 4096, 10240, 2),
    AUTO | {"architectures": ["InternLM3ForCausalLM"], "attention_dropout": 0.0, "bias": False,
            "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 32768,
            "model_type": "internlm3", "pad_token_id": 2, "qkv_bias": False, "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "rope_theta": 50000000,
            "tie_word_embeddings": False, "vocab_size": 128512},
    vocab_size=128512, block_size=32768, head_dim=128, rope=Rope(theta=5e7))
add("seed-oss-36b-base", (64, 80, 5120, 27648, 8),
    {"architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.1,
     "attention_out_bias": False, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 524288,
     "mlp_bias": False, "model_type": "seed_oss", "pad_token_id": 1, "residual_dropout": 0.1,
     "rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0,
     "tie_word_embeddings": False, "vocab_size": 155136},
    vocab_size=155136, block_size=524288, norm_eps=1e-6, head_dim=128, bias="q k v", rope=Rope(theta=1e7))
# mscale alone says nothing: the magnitude goes by the factor (Peng et al. 2023, eq. 22).
add("afm-4.5b", (36, 20, 2560, 18432, 4),
    {"architectures": ["ArceeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
     "head_dim": 128, "hidden_act": "relu2", "max_position_embeddings": 65536, "mlp_bias": False,
     "model_type": "arcee", "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False,
     "vocab_size": 128004, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0,
                                            "mscale": 1.0, "rope_type": "yarn",
                      "original_max_position_embeddings": 4096, "type": "yarn"}},
    vocab_size=128004, block_size=65536, head_dim=128, activation="relu2", gated=False,
    rope=Rope(scaling="yarn", factor=20.0, original=4096, slow=1.0, fast=32.0,
              magnitude=0.1 * math.log(20) + 1))

# -----------------------------------------------------------------------------
# StableLM 2 and the house of GPT-NeoX

STABLELM = {
    "architectures": ["StableLmForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 100257,
    "eos_token_id": 100257, "hidden_act": "silu", "hidden_dropout": 0.0, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096, "model_type": "stablelm", "partial_rotary_factor": 0.25,
    "rope_theta": 10000, "tie_word_embeddings": False, "use_qkv_bias": True, "vocab_size": 100352}
OURS_STABLELM = {"vocab_size": 100352, "block_size": 4096, "norm": "layer", "bias": "q k v norm"}
add("stablelm-2-1_6b", (24, 32, 2048, 5632, 32), STABLELM, **OURS_STABLELM, **{"rope": Rope(dim=16)})
add("stablelm-2-zephyr-1_6b", (24, 32, 2048, 5632, 32), STABLELM | {"rotary_scaling_factor": 1.0},
    **OURS_STABLELM, **{"rope": Rope(dim=16)})
add("stablelm-2-12b", (40, 32, 5120, 13824, 8),
    STABLELM | {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False},
    **OURS_STABLELM | {"bias": "norm", "qk_norm": "heads", "parallel": True, "shared_norm": True,
                       "rope": Rope(dim=40)})
add("stablelm-zephyr-3b", (32, 32, 2560, 6912, 32),
    STABLELM | {"use_qkv_bias": False, "vocab_size": 50304, "bos_token_id": 0, "eos_token_id": 0},
    **OURS_STABLELM | {"bias": "norm", "vocab_size": 50304, "rope": Rope(dim=20)})

NEOX = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "use_parallel_residual": True, "vocab_size": 50304}
OURS_NEOX = {"block_size": 2048, "norm": "layer", "parallel": True, "activation": "gelu", "gated": False,
             "bias": "q k v out up down norm", "vocab_size": 50304}
for name, vocab_size, n_layer, n_head, n_embd in (
        ("pythia-70m", 50304, 6, 8, 512), ("pythia-160m", 50304, 12, 12, 768),
        ("pythia-410m", 50304, 24, 16, 1024), ("pythia-1b", 50304, 16, 8, 2048),
        ("pythia-1.4b", 50304, 24, 16, 2048), ("pythia-2.8b", 50304, 32, 32, 2560),
        ("pythia-6.9b", 50432, 32, 32, 4096), ("pythia-12b", 50688, 36, 40, 5120)):
    add(name, (n_layer, n_head, n_embd, 4 * n_embd), NEOX | {"vocab_size": vocab_size},
        **OURS_NEOX | {"vocab_size": vocab_size, "rope": Rope(dim=n_embd // n_head // 4)})
NEOX_20B = {key: value for key, value in NEOX.items() if key != "use_parallel_residual"} | {
    "attention_probs_dropout_prob": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0,
    "vocab_size": 50432}
add("gpt-neox-20b", (44, 64, 6144, 24576), NEOX_20B,
    **OURS_NEOX | {"vocab_size": 50432, "activation": "gelu_tanh", "rope": Rope(dim=24)})
add("redpajama-incite-3b", (32, 32, 2560, 10240),
    NEOX | {"rotary_pct": 1.0, "use_parallel_residual": False, "vocab_size": 50432},
    **OURS_NEOX | {"vocab_size": 50432, "parallel": False})

# -----------------------------------------------------------------------------
# what the programs of today leave in such files, and what the libraries write

# Keys that trainers and other libraries add to the file of a model that they have saved.
ADDED = {
    "_attn_implementation": "sdpa", "_attn_implementation_autoset": True, "_flash_attn_2_enabled": True,
    "_commit_hash": "0" * 40, "attn_implementation": "flash_attention_2", "gradient_checkpointing": True,
    "num_labels": 2, "is_decoder": True}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name):
    content, fields = PUBLISHED[name]
    assert settled(parse_config(json.loads(json.dumps(content)))) == settled(GPTConfig(**fields))


def test_every_family_is_there():
    kinds = {content.get("text_config", content).get("model_type") for content, _ in PUBLISHED.values()}
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize("key", ADDED)
def test_what_others_add(key):
    content, fields = PUBLISHED["llama-3.2-1b"]
    assert parse_config(content | {key: ADDED[key]}) == parse_config(content)


def test_harmless_keys_occur():
    """A key that no file has does not belong to the list."""
    contents = [content for content, _ in PUBLISHED.values()]
    contents += [content["text_config"] for content in contents if "text_config" in content]
    seen = {key for content in contents for key in content}
    seen |= set(ADDED) | {"classifier_dropout"}               # GPT-NeoX as transformers writes it
    assert HARMLESS <= seen
    assert set(HARMLESS_AT) <= seen | {"is_causal"}           # transformers 5 asks every configuration for it


def test_the_lists_do_not_overlap():
    read = {key for family in FAMILIES.values() for key in [*family.keys, *family.biases, *family.switches]}
    assert not HARMLESS & (read | set(HARMLESS_AT) | set(OUT_OF_SCOPE_KEYS))
    assert not set(HARMLESS_AT) & set(OUT_OF_SCOPE_KEYS)
    assert not set(OUT_OF_SCOPE) & set(FAMILIES)


# -----------------------------------------------------------------------------
# what is refused

YARN_KEYS = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
NO_OPT = {"do_layer_norm_before": False, "word_embed_proj_dim": 512, "hidden_size": 1024,
          "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096}              # OPT-350M


@pytest.mark.parametrize("kind", OUT_OF_SCOPE)
def test_families_out_of_scope(kind):
    with pytest.raises(ValueError) as refusal:
        parse_config({"model_type": kind, "hidden_size": 64})
    line = str(refusal.value)
    assert line.startswith(f"model_type is {kind!r}: {OUT_OF_SCOPE[kind]}") and "\n" not in line


@pytest.mark.parametrize("wrapper, reason", [
    ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "a mixture of experts"),
    ({"model_type": "qwen3_5", "text_config": {"hidden_size": 64}}, "linear or hybrid attention"),
    ({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}}, "norms of the values")])
def test_wrappers_out_of_scope(wrapper, reason):
    with pytest.raises(ValueError, match=f"^model_type is '{wrapper['model_type']}_text': {reason}, which"):
        parse_config(wrapper)


@pytest.mark.parametrize("kind", ["nanogpt", None, ["llama"], "Llama"])
def test_families_that_nobody_knows(kind):
    with pytest.raises(ValueError, match="it must be one of gpt2, opt, llama"):
        parse_config({"model_type": kind})


@pytest.mark.parametrize("key", OUT_OF_SCOPE_KEYS)
def test_keys_out_of_scope(key):
    content, _ = PUBLISHED["llama-3.1-8b"]
    words = f"{key} is 8: {OUT_OF_SCOPE_KEYS[key]}, which this code does not have"
    with pytest.raises(ValueError, match=f"^{words}$"):
        parse_config(content | {key: 8})
    assert parse_config(content | {key: None}) == parse_config(content)


@pytest.mark.parametrize("key", HARMLESS_AT)
def test_keys_that_are_harmless_at_one_value(key):
    content, _ = PUBLISHED["llama-3.1-8b"]
    assert parse_config(content | {key: HARMLESS_AT[key]}) == parse_config(content)
    for wrong in (0.5, False):
        with pytest.raises(ValueError, match=f"^{key} is {wrong}; only {HARMLESS_AT[key]!r} is supported$"):
            parse_config(content | {key: wrong})


@pytest.mark.parametrize("name, changes, words", [
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"n_special": 40}, "unknown key 'n_special'"),
    ("opt-125m", NO_OPT, "word_embed_proj_dim is 512; only 1024"),
    ("opt-125m", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
    ("opt-1.3b", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
    ("opt-125m", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
    ("llama-2-7b", {"sliding_window": 4096}, "sliding_window is 4096, which llama does not have"),
    ("llama-2-7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which llama does not have"),
    ("llama-2-7b", {"layer_types": ["sliding_attention"] * 32}, "layer_types holds sliding_attention"),
    ("llama-2-7b", {"layer_types": ["chunked_attention"] * 32}, "layer_types is"),
    ("llama-2-7b", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
    ("llama-2-7b", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ("llama-2-7b", {"attention_bias": "no"}, "attention_bias is 'no'"),
    ("llama-2-7b", {"rope_theta": 0}, "rope_theta is 0"),
    ("llama-2-7b", {"rope_scaling": {"factor": 4.0}}, "rotary scaling of factor 4.0, but no rope_type"),
    ("llama-2-7b", {"rope_scaling": {"type": "ntk", "factor": 4.0}}, "rotary scaling 'ntk'"),
    ("llama-2-7b", {"rope_scaling": {"type": "linear", "factor": 4.0, "finetuned": True}},
     "does not have finetuned"),
    ("llama-3.1-8b", {"rope_scaling": SCALING | {"low_freq_factor": None}}, "low_freq_factor is None"),
    ("llama-2-7b", {"_rotary": "neighbours"}, "unknown key '_rotary'"),
    ("smollm2-135m", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("smollm3-3b", {"no_rope_layers": [1, 0]}, "no_rope_layers is"),
    ("mistral-7b-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types is"),
    ("qwen2.5-7b", {"attention_bias": True}, "unknown key 'attention_bias'"),
    ("phi-3-mini-4k-instruct", {"attention_bias": True}, "unknown key 'attention_bias'"),
    ("phi-3-mini-128k-instruct", {"rope_scaling": LONGROPE["rope_scaling"] | {"short_factor": [1.0]}},
     "48 numbers"),
    ("gemma-3-1b-pt", {"final_logit_softcapping": 30.0},
     "final_logit_softcapping is 30.0: caps of the logits"),
    ("gemma-3-270m", {"layer_types": SIX}, "layer_types is"),
    ("granite-3.0-2b-base", {"logits_scaling": 0}, "logits_scaling is 0"),
    ("granite-3.0-2b-base", {"num_local_experts": 8}, "num_local_experts is 8: a mixture of experts"),
    ("starcoder2-3b", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; only 1e-05"),
    ("starcoder2-3b", {"activation_function": "relu"}, "activation_function is 'relu'"),
    ("pythia-70m", {"rope_theta": 500000},
     "rope_theta is 500000 in one place of config.json and 10000 in another"),
    ("gemma-1.1-2b-it", {"hidden_activation": "silu"}, "hidden_activation is 'silu'")])
def test_values_refused(name, changes, words):
    content, _ = PUBLISHED[name]
    with pytest.raises(ValueError) as refusal:
        parse_config(content | changes)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name, changes", [
    ("llama-2-7b", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
                    "rope_theta": 10000.0}),
    ("llama-3.1-8b", {"rope_parameters": SCALING | {"factor": 32.0, "rope_theta": 500000.0}}),
    ("llama-3.1-8b", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ("qwen3-8b with yarn",
     {"rope_parameters": STRETCHED3["rope_scaling"] | {"original_max_position_embeddings": 4096}}),
    ("phi-4-mini-instruct", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}}),
    ("olmo-3-7b", {"rope_parameters": {"full_attention": {"rope_type": "default"},
                                       "sliding_attention": None}}),
    ("devstral-small-2-24b", {"tie_word_embeddings": True,
                              "text_config": DEVSTRAL_TEXT | {"tie_word_embeddings": False}})])
def test_contradictions(name, changes):
    content, _ = PUBLISHED[name]
    with pytest.raises(ValueError, match="in one place of config.json and .* in another"):
        parse_config(content | changes)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b with yarn", "phi-4-mini-instruct", "gemma-2b"])
def test_both_layouts_at_once(name):
    """Where rope_scaling and rope_parameters agree."""
    content, _ = PUBLISHED[name]
    parameters = (content["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": content["rope_theta"]}
    assert parse_config(content | {"rope_parameters": parameters}) == parse_config(content)


@pytest.mark.parametrize("changes", [
    {"rope_scaling": {"type": "default"}}, {"rope_scaling": {"rope_type": "default", "factor": 1.0}},
    {"rope_scaling": {}}, {"attention_bias": None}, {"layer_types": ["full_attention"] * 32},
    {"head_dim": None}, {"rope_parameters": None}])
def test_what_changes_nothing(changes):
    content, _ = PUBLISHED["llama-2-7b"]
    assert parse_config(content | changes) == parse_config(content)


@pytest.mark.parametrize("kind", [{"type": "linear"}, SCALING, YARN_KEYS])
def test_scaling_by_one(kind):
    content, _ = PUBLISHED["llama-2-7b"]
    rope = parse_config(content | {"rope_scaling": kind | {"factor": 1.0}}).rope
    assert rope.magnitude == 1 and torch.allclose(frequencies(rope, 128), frequencies(Rope(), 128), rtol=1e-6)


@pytest.mark.parametrize("changes, method", [
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 6.0}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
     "compressed-tensors"),
    ({"compression_config": {"format": "int-quantized"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4, "group_size": 64}},
     "mlx"),
    ({"quantization_config": {"bits": 4}}, "an unknown method")])
@pytest.mark.parametrize("name", ["qwen3-8b", "devstral-small-2-24b"])
def test_quantized_files(name, changes, method):
    content, _ = PUBLISHED[name]
    with pytest.raises(ValueError, match=f"the checkpoint is quantized already .{method}."):
        parse_config(content | changes)
    if "text_config" in content:
        with pytest.raises(ValueError, match=f"the checkpoint is quantized already .{method}."):
            parse_config(content | {"text_config": content["text_config"] | changes})


def test_a_quantized_expert_is_told_by_its_quantization():
    with pytest.raises(ValueError, match="quantized already .mxfp4."):
        parse_config({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}})


# -----------------------------------------------------------------------------
# what both transformers libraries write

# Sizes that are told to every family of its own; the rest is what the library takes for granted.
SMALL_KEYS = {"vocab_size": 61, "num_hidden_layers": 8, "num_attention_heads": 4, "hidden_size": 32,
              "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"intermediate_size": 40, "num_key_value_heads": 2}       # of all but the three oldest families
PAIRS = {"short_factor": [1.0 + i / 8 for i in range(4)], "long_factor": [2.0 + i for i in range(4)]}
OPTIONS = {
    "gpt2": [{"n_inner": 40, "activation_function": "gelu"}],
    "llama": [{"rope_scaling": SCALING | {"original_max_position_embeddings": 128}, "rope_theta": 5e5},
              {"attention_bias": True, "mlp_bias": True, "head_dim": 6}, {"rope_scaling": YARN_KEYS}],
    "mistral": [{"sliding_window": None}, {"sliding_window": 16}],
    "qwen2": [{"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 5}],
    "qwen3": [{"attention_bias": True, "rope_scaling": YARN_KEYS}],
    "phi3": [{"rope_scaling": {"type": "longrope", **PAIRS}, "original_max_position_embeddings": 128},
             {"sliding_window": 15, "hidden_size": 64, "partial_rotary_factor": 0.75}],
    "smollm3": [{"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 16}],
    "gemma": [{"head_dim": 8}],
    "gemma3_text": [{"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 16}],
    "olmo3": [{"rope_scaling": YARN_KEYS, "sliding_window": 16}],
    "granite": [{"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}],
    "starcoder2": [{"use_bias": False, "sliding_window": 16}],
    "seed_oss": [{"attention_out_bias": True, "mlp_bias": True}],
    "internlm3": [{"attention_bias": True, "mlp_bias": True}],
    "stablelm": [{"use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True}],
    "gpt_neox": [{"attention_bias": False, "use_parallel_residual": False}],
    "arcee": [{"mlp_bias": True, "rope_scaling": YARN_KEYS}]}
WRITES = """
import json, pathlib, sys, tempfile
from transformers import AutoConfig
def written(kind, options):
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(kind, **options).save_pretrained(folder)
        return json.loads(pathlib.Path(folder, "config.json").read_text())
found = []
for kind, options in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    try:
        AutoConfig.for_model(kind)
    except ValueError:
        found.append(None)          # this version of the library does not know it
        continue
    found.append(written(kind, options))
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
print(json.dumps([found, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]))
"""


def cases():
    """[(model_type, options)] that the libraries are asked to write."""
    asked = []
    for kind in FAMILIES:
        small = SMALL_KEYS if kind in ("gpt2", "opt", "gpt_neox") else SMALL_KEYS | GROUPED
        if kind == "olmo3":                     # whose base the versions take for granted differently
            small = small | {"rope_theta": 5e5}
        asked += [(kind, {}), (kind, small)]
        asked += [(kind, small | options) for options in OPTIONS.get(kind, [])]
    return [*asked, ("gemma3", {}), ("gemma3", {"text_config": SMALL_KEYS | GROUPED})]


# Decoders without anything that is out of scope; they only have no row in lib/families.py.
WITHOUT_A_ROW = {"biogpt", "code_llama", "cwm", "exaone4", "gpt-sw3", "gpt_bigcode", "gpt_neo", "hyperclovax",
                 "iquestcoder", "jais2", "nemotron", "open-llama"}


def read_all(printed):
    """{place among the cases: GPTConfig} of what a library wrote, after the kinds were checked."""
    contents, kinds = json.loads(printed.splitlines()[-1])
    assert set(kinds) <= {*OUT_OF_SCOPE, *FAMILIES, *WITHOUT_A_ROW, "gemma3"}
    return {i: parse_config(content) for i, content in enumerate(contents) if content is not None}


@pytest.mark.peers
def test_what_the_libraries_write(peer, tmp_path):
    """Both versions say the same architecture in their ways, and nothing that they write is refused."""
    (tmp_path / "cases.json").write_text(json.dumps(cases()))
    five = read_all(peer(WRITES, tmp_path / "cases.json"))
    assert len(five) == len(cases())
    if "NANOPEFT_ADAPTERS" not in os.environ:
        pytest.skip("NANOPEFT_ADAPTERS does not name a Python with transformers 4")
    command = [os.environ["NANOPEFT_ADAPTERS"], "-I", "-W", "ignore", "-c", WRITES, tmp_path / "cases.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    four = read_all(done.stdout)
    unknown = {kind for i, (kind, _) in enumerate(cases()) if i not in four}
    assert unknown == {"ministral3", "internlm3"}
    small = [i for i in four if cases()[i][1]]
    assert {i: settled(four[i]) for i in small} == {i: settled(five[i]) for i in small}


TURNS = """
import json, pathlib, sys
import torch, transformers
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
transformers.logging.set_verbosity_error()
def turns(config, layer_type):
    said = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    if said["rope_type"] == "default":
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(d_head * said.get("partial_rotary_factor", 1.0))
        return (said["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)).tolist(), 1.0
    of_layer = {"layer_type": layer_type} if layer_type else {}
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[said["rope_type"]](config, "cpu", **of_layer)
    return frequencies.tolist(), magnitude
found = {}
for name, content in json.loads(pathlib.Path(sys.argv[1]).read_text()).items():
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    text, both = config.get_text_config(), ("full_attention", "sliding_attention")
    by_layer = both[0] in text.rope_parameters
    said = [turns(text, kind) for kind in (both if by_layer else [None])]
    found[name] = bool(config.tie_word_embeddings), said
print(json.dumps(found))
"""


@pytest.mark.peers
def test_rotary_frequencies(peer, tmp_path):
    """Published models' positions turn as fast, and grow by as much, as transformers computes."""
    old = "phi-3-mini-128k-instruct of april 2024"                  # transformers 5.23 fails on "su"
    rotated = {name: content for name, (content, _) in PUBLISHED.items()
               if parse_config(content).position == "rope" and name != old}
    (tmp_path / "published.json").write_text(json.dumps(rotated))
    found = json.loads(peer(TURNS, tmp_path / "published.json").splitlines()[-1])
    assert found.keys() == rotated.keys()
    for name, (tied, theirs) in found.items():
        config = parse_config(rotated[name])
        assert config.tied == tied, name
        ours = [config.rope, config.local_rope or config.rope][:len(theirs)]
        for rope, (turns, magnitude) in zip(ours, theirs):
            assert torch.allclose(frequencies(rope, config.d_head), torch.tensor(turns), rtol=2e-6), name
            assert rope.magnitude == pytest.approx(magnitude, rel=1e-9), name
