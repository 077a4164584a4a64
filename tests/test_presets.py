"""The presets against published counts of parameters, and against published configurations for what a count does not show."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lib import origin
from model import GPT, PRESETS

# Parameters, the tied head once. Those of the Hugging Face hub's pages (and of keras-hub's presets for Gemma and Qwen3), as
# transformers 5.23 counts them in its own models of these sizes. Gemma's are of the text part; gpt2-medium's is the lecture's table.
PARAMETERS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "opt-1.3b": 1_315_758_080, "tinyllama-1.1b": 1_100_048_384,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952, "gemma-3-4b": 3_880_263_168, "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-3-mini": 3_821_079_552, "phi-4-mini": 3_836_021_760, "phi-4": 14_659_507_200,
    "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320,
}
# The shapes of BERT as decoders are nobody's models: V d + 512 d + L (12 d^2 + 13 d) + 2 d.
PARAMETERS |= {name: (30522 + 512) * d + L * (12 * d**2 + 13 * d) + 2 * d
               for name, L, d in (("bert-base", 12, 768), ("bert-large", 24, 1024))}


def test_every_preset_is_counted():
    assert PARAMETERS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        assert GPT(PRESETS[name]).num_params() == PARAMETERS[name]


# The hub's config.json of one model of each kind: the keys that say what is computed, as they stand there.
LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-05, "attention_bias": False, "mlp_bias": False}
QWEN = {"hidden_act": "silu", "rope_theta": 1000000.0, "use_sliding_window": False}
GEMMA = {"model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
         "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
         "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
         "vocab_size": 262144}
PHI = {"model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-05, "attention_bias": False}
GLOBAL_AND_LOCAL = 5 * ["sliding_attention"] + ["full_attention"]
LONG_FACTORS = [1.0 + i for i in range(48)]         # Phi-4-mini's own are others; they act beyond 4,096 tokens, where no GPT goes.
PUBLISHED = {
    "llama-3.2-1b": LLAMA | {
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                         "rope_type": "llama3"}, "vocab_size": 128256},
    "llama-3.1-8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
                         "rope_type": "llama3"}, "vocab_size": 128256},
    "smollm2-135m": LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rope_interleaved": False, "rope_scaling": None,
        "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152},
    "smollm2-1.7b": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 8192, "num_attention_heads": 32,
        "num_hidden_layers": 24, "num_key_value_heads": 32, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 130000,
        "tie_word_embeddings": True, "vocab_size": 49152},
    "mistral-7b-v0.1": {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000},
    "mistral-7b-v0.3": {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768},
    "qwen2.5-0.5b": QWEN | {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_mrope": False, "vocab_size": 151936},
    "qwen2.5-14b": QWEN | {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "max_position_embeddings": 131072, "max_window_layers": 48,
        "num_attention_heads": 40, "num_hidden_layers": 48, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "sliding_window": 131072,
        "tie_word_embeddings": False, "vocab_size": 152064},
    "qwen3-8b": QWEN | {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288,
        "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 151936},
    "gemma-3-270m": GEMMA | {
        "_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048, "layer_types": 3 * GLOBAL_AND_LOCAL,
        "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1, "use_bidirectional_attention": False},
    "gemma-3-1b": GEMMA | {
        "cache_implementation": "hybrid", "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "sliding_window_pattern": 6},
    "gemma-3-4b": {"model_type": "gemma3", "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}},
    "gemma-3-27b": {"model_type": "gemma3", "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text", "num_attention_heads": 32,
        "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}},
    "phi-3-mini": PHI | {
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "rope_scaling": None,
        "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064},
    "phi-4-mini": PHI | {
        "full_attn_mod": 1, "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": LONG_FACTORS, "short_factor": 48 * [1.0], "type": "longrope"}, "rope_theta": 10000.0,
        "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064},
    "phi-4": PHI | {
        "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16384, "rope_scaling": None,
        "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 100352},
    "pythia-1b": {
        "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 8192, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 16, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304},
}


def resolved(config):
    """The same configuration with every field said that follows from others, and nothing said that does not act."""
    windows = tuple(n if 0 < n < config.block_size else 0 for n in config.windows)
    parts = {"q", "k", "v", "out", "up", "down", *(["gate"] if config.gated else []), *(["norm"] if config.norm == "layer" else [])}
    ropes = {name: dataclasses.replace(rope, dim=rope.dim or config.d_head) for name in ("rope", "local_rope")
             if (rope := getattr(config, name))}
    return dataclasses.replace(
        config, n_kv_head=config.kv_heads, n_ffn=config.d_ffn, head_dim=config.d_head, windows=windows if any(windows) else (),
        bias=" ".join(sorted(parts & set(config.bias.split()))), attention_scale=config.attention_scale or config.d_head**-0.5, **ropes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configuration_is_the_preset(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    assert resolved(origin.read_config(tmp_path)) == resolved(PRESETS[name])


def test_phi4_minis_magnitude():
    """The attention factor that the paper of LongRoPE and transformers have for a context stretched from 4,096 to 131,072."""
    assert math.isclose(PRESETS["phi-4-mini"].rope.magnitude, 1.1902380714238083, rel_tol=1e-15)


def test_the_names_are_known_without_torch():
    code = "import sys; sys.modules['torch'] = None; from lib.presets import PRESETS; print(*PRESETS)"
    names = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert names == list(PRESETS)
