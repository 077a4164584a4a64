"""
Published architectures by name, as fields of model.GPTConfig. A field that is not named here has GPTConfig's
default. The numbers are those of the models' config.json on the Hugging Face hub.

    from lib.presets import PRESETS
    PRESETS["llama-3.2-1b"]["n_layer"]          # 16

It is plain data without torch: `rope` and `local_rope` are the fields of model.Rope.
"""

import math

PRESETS = {}


def shape(n_layer, n_head, n_embd, n_ffn=0, n_kv_head=0):
    """The fields in which the sizes of a family differ; 0 means that the field follows from the others."""
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_ffn": n_ffn, "n_kv_head": n_kv_head}


# What Llama began and most others kept: rotary positions, RMSNorm, gated FFN, no bias.
LLAMA_LIKE = {"position": "rope", "norm": "rms", "activation": "silu", "gated": True, "bias": "",
              "tied": False}

# -----------------------------------------------------------------------------
# the lecture's models

OPT = {"vocab_size": 50272, "block_size": 2048, "position_offset": 2, "activation": "relu"}
# The shape alone, because BERT has its norms after the parts.
BERT = {"vocab_size": 30522, "block_size": 512, "norm_eps": 1e-12, "activation": "gelu"}
LLAMA = LLAMA_LIKE | {"vocab_size": 32000, "block_size": 2048, "norm_eps": 1e-6}

PRESETS["gpt2"] = {}
PRESETS["gpt2-medium"] = shape(24, 16, 1024)
PRESETS["gpt2-large"] = shape(36, 20, 1280)
PRESETS["gpt2-xl"] = shape(48, 25, 1600)
PRESETS["bert-base"] = BERT
PRESETS["bert-large"] = BERT | shape(24, 16, 1024)
PRESETS["opt-1.3b"] = OPT | shape(24, 32, 2048)
PRESETS["tinyllama-1.1b"] = LLAMA | shape(22, 32, 2048, 5632, 4) | {"norm_eps": 1e-5}
PRESETS["llama-7b"] = LLAMA | shape(32, 32, 4096, 11008)
PRESETS["llama-13b"] = LLAMA | shape(40, 40, 5120, 13824)
PRESETS["llama-33b"] = LLAMA | shape(60, 52, 6656, 17920)
PRESETS["llama-65b"] = LLAMA | shape(80, 64, 8192, 22016, 64) | {"norm_eps": 1e-5}

# -----------------------------------------------------------------------------
# Llama 3, Mistral, SmolLM2

LLAMA3_ROPE = {"theta": 500000.0, "scaling": "llama3", "original": 8192, "slow": 1.0, "fast": 4.0}
LLAMA3 = LLAMA_LIKE | {"vocab_size": 128256, "block_size": 131072, "norm_eps": 1e-5}
LLAMA31 = LLAMA3 | {"rope": LLAMA3_ROPE | {"factor": 8.0}}
LLAMA32 = LLAMA3 | {"rope": LLAMA3_ROPE | {"factor": 32.0}, "tied": True}
MISTRAL = LLAMA_LIKE | {"block_size": 32768, "norm_eps": 1e-5}
MISTRAL_01 = MISTRAL | {"vocab_size": 32000, "windows": (4096,) * 32}
MISTRAL_03 = MISTRAL | {"vocab_size": 32768, "rope": {"theta": 1e6}}
SMOLLM2 = LLAMA_LIKE | {"vocab_size": 49152, "block_size": 8192, "norm_eps": 1e-5, "tied": True}

PRESETS["llama-3.1-8b"] = LLAMA31 | shape(32, 32, 4096, 14336, 8)
PRESETS["llama-3.1-70b"] = LLAMA31 | shape(80, 64, 8192, 28672, 8)
PRESETS["llama-3.2-1b"] = LLAMA32 | shape(16, 32, 2048, 8192, 8)
PRESETS["llama-3.2-3b"] = LLAMA32 | shape(28, 24, 3072, 8192, 8)
PRESETS["mistral-7b-v0.1"] = MISTRAL_01 | shape(32, 32, 4096, 14336, 8)
PRESETS["mistral-7b-v0.3"] = MISTRAL_03 | shape(32, 32, 4096, 14336, 8)
PRESETS["smollm2-135m"] = SMOLLM2 | shape(30, 9, 576, 1536, 3) | {"rope": {"theta": 100000.0}}
PRESETS["smollm2-360m"] = SMOLLM2 | shape(32, 15, 960, 2560, 5) | {"rope": {"theta": 100000.0}}
PRESETS["smollm2-1.7b"] = SMOLLM2 | shape(24, 32, 2048, 8192, 32) | {"rope": {"theta": 130000.0}}

# -----------------------------------------------------------------------------
# Qwen; from Qwen2.5-14B on the eps is the base models', the instructed ones have 1e-6

QWEN = LLAMA_LIKE | {"vocab_size": 151936, "norm_eps": 1e-6, "rope": {"theta": 1e6}}
QWEN25_SMALL = QWEN | {"block_size": 32768, "bias": "q k v", "tied": True}
QWEN25_MIDDLE = QWEN | {"vocab_size": 152064, "block_size": 131072, "bias": "q k v"}
QWEN25_LARGE = QWEN25_MIDDLE | {"norm_eps": 1e-5}
QWEN3 = QWEN | {"block_size": 40960, "head_dim": 128, "qk_norm": "head"}
QWEN3_SMALL = QWEN3 | {"tied": True}

PRESETS["qwen2.5-0.5b"] = QWEN25_SMALL | shape(24, 14, 896, 4864, 2)
PRESETS["qwen2.5-1.5b"] = QWEN25_SMALL | shape(28, 12, 1536, 8960, 2) | {"block_size": 131072}
PRESETS["qwen2.5-3b"] = QWEN25_SMALL | shape(36, 16, 2048, 11008, 2)
PRESETS["qwen2.5-7b"] = QWEN25_MIDDLE | shape(28, 28, 3584, 18944, 4)
PRESETS["qwen2.5-14b"] = QWEN25_LARGE | shape(48, 40, 5120, 13824, 8)
PRESETS["qwen2.5-32b"] = QWEN25_LARGE | shape(64, 40, 5120, 27648, 8)
PRESETS["qwen2.5-72b"] = QWEN25_LARGE | shape(80, 64, 8192, 29568, 8)
PRESETS["qwen3-0.6b"] = QWEN3_SMALL | shape(28, 16, 1024, 3072, 8)
PRESETS["qwen3-1.7b"] = QWEN3_SMALL | shape(28, 16, 2048, 6144, 8)
PRESETS["qwen3-4b"] = QWEN3_SMALL | shape(36, 32, 2560, 9728, 8)
PRESETS["qwen3-8b"] = QWEN3 | shape(36, 32, 4096, 12288, 8)
PRESETS["qwen3-14b"] = QWEN3 | shape(40, 40, 5120, 17408, 8)
PRESETS["qwen3-32b"] = QWEN3 | shape(64, 64, 5120, 25600, 8)

# -----------------------------------------------------------------------------
# Gemma 3, the text part

GEMMA_NORMS = {"norm_eps": 1e-6, "norm_offset": 1.0, "norm_place": "both", "qk_norm": "head"}
GEMMA_ROPES = {"rope": {"theta": 1e6}, "local_rope": {"theta": 10000.0}}
GEMMA = LLAMA_LIKE | GEMMA_NORMS | GEMMA_ROPES | {"activation": "gelu_tanh", "tied": True, "head_dim": 256}
GEMMA_SMALL = GEMMA | {"vocab_size": 262144, "block_size": 32768}
GEMMA_LARGE = GEMMA | {"vocab_size": 262208, "block_size": 131072}
GEMMA_LARGE["rope"] = {"theta": 1e6, "scaling": "linear", "factor": 8.0}


def gemma(window, n_layer, n_head, n_embd, n_ffn, n_kv_head):
    """The fields in which Gemma's sizes differ. Every sixth layer sees all tokens, the others a window."""
    windows = tuple(0 if layer % 6 == 5 else window for layer in range(n_layer))
    return shape(n_layer, n_head, n_embd, n_ffn, n_kv_head) | {"windows": windows, "embed_scale": n_embd**0.5}


PRESETS["gemma-3-270m"] = GEMMA_SMALL | gemma(512, 18, 4, 640, 2048, 1)
PRESETS["gemma-3-1b"] = GEMMA_SMALL | gemma(512, 26, 4, 1152, 6912, 1)
PRESETS["gemma-3-4b"] = GEMMA_LARGE | gemma(1024, 34, 8, 2560, 10240, 4)
PRESETS["gemma-3-12b"] = GEMMA_LARGE | gemma(1024, 48, 16, 3840, 15360, 8)
PRESETS["gemma-3-27b"] = GEMMA_LARGE | gemma(1024, 62, 32, 5376, 21504, 16)
PRESETS["gemma-3-27b"] |= {"head_dim": 128, "attention_scale": 168**-0.5}

# -----------------------------------------------------------------------------
# Phi

# Phi-4-mini rotates with one set of frequencies up to 4,096 tokens and with another up to 131,072. A GPT has
# the first set alone, so that its context ends there; the magnitude goes by the ratio of the two contexts.
PHI4_MINI_ROPE = {"theta": 10000.0, "dim": 96, "scaling": "longrope", "factor": 32.0, "original": 4096,
                  "factors": (1.0,) * 48, "magnitude": math.sqrt(1 + math.log(32) / math.log(4096))}
PHI = LLAMA_LIKE | {"block_size": 4096, "norm_eps": 1e-5}
PHI3_MINI = PHI | {"vocab_size": 32064, "windows": (2047,) * 32}
PHI4_MINI = PHI | {"vocab_size": 200064, "tied": True, "rope": PHI4_MINI_ROPE}
PHI4 = PHI | {"vocab_size": 100352, "block_size": 16384, "rope": {"theta": 250000.0}}

PRESETS["phi-3-mini"] = PHI3_MINI | shape(32, 32, 3072, 8192, 32)
PRESETS["phi-4-mini"] = PHI4_MINI | shape(32, 24, 3072, 8192, 8)
PRESETS["phi-4"] = PHI4 | shape(40, 40, 5120, 17920, 10)

# -----------------------------------------------------------------------------
# Pythia

PYTHIA = {"block_size": 2048, "position": "rope", "parallel": True, "activation": "gelu", "tied": False}


def pythia(vocab_size, n_layer, n_head, n_embd):
    """Pythia of a size. A quarter of a head is rotated."""
    rope = {"theta": 10000.0, "dim": n_embd // n_head // 4}
    return PYTHIA | {"vocab_size": vocab_size, "rope": rope} | shape(n_layer, n_head, n_embd)


PRESETS["pythia-70m"] = pythia(50304, 6, 8, 512)
PRESETS["pythia-160m"] = pythia(50304, 12, 12, 768)
PRESETS["pythia-410m"] = pythia(50304, 24, 16, 1024)
PRESETS["pythia-1b"] = pythia(50304, 16, 8, 2048)
PRESETS["pythia-1.4b"] = pythia(50304, 24, 16, 2048)
PRESETS["pythia-2.8b"] = pythia(50304, 32, 32, 2560)
PRESETS["pythia-6.9b"] = pythia(50432, 32, 32, 4096)
PRESETS["pythia-12b"] = pythia(50688, 36, 40, 5120)
