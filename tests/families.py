"""
Tiny checkpoints of every family, as the tests have the transformers library write them: CASES is the table, WRITE
the script that its interpreters run. No package is needed to import this file.
"""

SMALL = dict(vocab_size=83, hidden_size=48, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
ODD_HEADS = dict(SMALL, head_dim=20)                     # 4 heads of 20 are not the width of 48.
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
WINDOWED, FULL = "sliding_attention", "full_attention"
MIXED = [WINDOWED, FULL, WINDOWED]
VISION = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=16,
              patch_size=8)
LONG = dict(vocab_size=97, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=256, original_max_position_embeddings=64)
SHORT_FACTORS = [1.0, 1.05, 1.3, 1.6, 2.2, 2.9, 3.5, 4.1, 5.0, 6.0, 7.0, 8.0]
LONG_FACTORS = [2 * factor for factor in SHORT_FACTORS]


def longrope(n):
    """Phi-3's scaling for n frequencies."""
    return dict(type="longrope", short_factor=SHORT_FACTORS[:n], long_factor=LONG_FACTORS[:n])


def opt(**changes):
    """OPT's own names of what the other families call by SMALL's."""
    return dict(vocab_size=83, hidden_size=40, word_embed_proj_dim=40, ffn_dim=72, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=64) | changes


def gpt2(**changes):
    """GPT-2's own names."""
    return dict(vocab_size=83, n_positions=64, n_embd=40, n_layer=3, n_head=4) | changes


def neox(**changes):
    """GPT-NeoX has as many keys as queries, and heads of hidden_size / num_attention_heads."""
    return dict(vocab_size=83, hidden_size=48, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=64) | changes


# name -> (model_type, the configuration's arguments, in the words of transformers 4, which 5 understands)
CASES = {
    "gpt2": ("gpt2", gpt2()),
    "gpt2-inner": ("gpt2", gpt2(n_inner=72, activation_function="gelu", layer_norm_epsilon=1e-3)),
    "gpt2-untied": ("gpt2", gpt2(tie_word_embeddings=False, activation_function="gelu_pytorch_tanh")),
    "opt": ("opt", opt()),
    "opt-gelu": ("opt", opt(activation_function="gelu", tie_word_embeddings=False)),
    "opt-biasless": ("opt", opt(enable_bias=False)),

    "llama": ("llama", SMALL),
    "llama-odd": ("llama", dict(ODD_HEADS, rope_theta=5000.0, rms_norm_eps=1e-4)),
    "llama-tied": ("llama", dict(ODD_HEADS, tie_word_embeddings=True, hidden_act="gelu")),
    "llama-attention-bias": ("llama", dict(SMALL, attention_bias=True)),
    "llama-mlp-bias": ("llama", dict(SMALL, mlp_bias=True)),
    "llama-biases": ("llama", dict(ODD_HEADS, attention_bias=True, mlp_bias=True, num_key_value_heads=1)),
    "llama-llama3": ("llama", dict(ODD_HEADS, rope_theta=500.0, rope_scaling=LLAMA3, tie_word_embeddings=True)),
    "llama-linear": ("llama", dict(SMALL, rope_scaling=dict(rope_type="linear", factor=2.5))),
    "llama-dynamic": ("llama", dict(SMALL, rope_scaling=dict(rope_type="dynamic", factor=2.0))),
    "llama-yarn": ("llama", dict(SMALL, rope_scaling=YARN)),
    "llama-yarn-factor": ("llama", dict(ODD_HEADS, rope_theta=50.0, rope_scaling=dict(YARN, attention_factor=1.3))),
    "llama-yarn-mscale": ("llama", dict(ODD_HEADS, rope_theta=50.0,
                                        rope_scaling=dict(YARN, mscale=0.7, mscale_all_dim=1.3))),
    "llama-yarn-betas": ("llama", dict(ODD_HEADS, rope_theta=50.0,
                                       rope_scaling=dict(YARN, beta_fast=2.0, beta_slow=0.3))),
    "llama-yarn-whole": ("llama", dict(ODD_HEADS, rope_theta=50.0,
                                       rope_scaling=dict(YARN, beta_fast=2.0, beta_slow=0.3, truncate=False))),

    "mistral": ("mistral", dict(ODD_HEADS, sliding_window=None)),
    "mistral-window": ("mistral", dict(ODD_HEADS, sliding_window=5)),
    "mistral-window-tied": ("mistral", dict(SMALL, sliding_window=2, tie_word_embeddings=True)),
    "ministral": ("ministral", dict(ODD_HEADS, sliding_window=5, layer_types=MIXED)),
    "ministral-full": ("ministral", dict(ODD_HEADS, sliding_window=5, layer_types=[FULL] * 3)),
    "ministral3": ("ministral3", dict(ODD_HEADS, sliding_window=None, rope_parameters=dict(
        YARN, rope_theta=50.0, beta_fast=2.0, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.0))),

    "qwen2": ("qwen2", SMALL),
    "qwen2-tied": ("qwen2", dict(SMALL, num_key_value_heads=1, tie_word_embeddings=True, rope_theta=1e6)),
    "qwen2-window": ("qwen2", dict(SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen2-window-off": ("qwen2", dict(SMALL, use_sliding_window=False, sliding_window=5, max_window_layers=0)),
    "qwen2-yarn": ("qwen2", dict(SMALL, rope_scaling=YARN)),
    "qwen3": ("qwen3", dict(ODD_HEADS, tie_word_embeddings=True, rope_theta=1e6)),
    "qwen3-bias": ("qwen3", dict(ODD_HEADS, attention_bias=True)),
    "qwen3-window": ("qwen3", dict(ODD_HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=2)),

    "phi3": ("phi3", dict(SMALL, num_key_value_heads=4, sliding_window=6)),
    "phi3-groups": ("phi3", dict(SMALL, sliding_window=None)),
    "phi3-longrope": ("phi3", dict(LONG, num_key_value_heads=1, rope_scaling=longrope(12))),
    "phi3-longrope-factor": ("phi3", dict(LONG, num_key_value_heads=2,
                                          rope_scaling=longrope(12) | dict(attention_factor=1.4))),
    "phi4-mini": ("phi3", dict(LONG, num_attention_heads=3, num_key_value_heads=1, partial_rotary_factor=0.75,
                               rope_scaling=longrope(6), tie_word_embeddings=True)),

    "smollm3": ("smollm3", dict(SMALL, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0])),
    "smollm3-interval": ("smollm3", dict(SMALL, num_hidden_layers=4, no_rope_layer_interval=2, rope_theta=2e6,
                                         tie_word_embeddings=False)),
    "smollm3-window": ("smollm3", dict(SMALL, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5)),
    "smollm3-biases": ("smollm3", dict(SMALL, attention_bias=True, mlp_bias=True, no_rope_layers=[1, 1, 1])),

    "gemma": ("gemma", ODD_HEADS),
    "gemma-untied": ("gemma", dict(ODD_HEADS, num_key_value_heads=1, tie_word_embeddings=False,
                                   attention_bias=True)),
    "gemma3": ("gemma3_text", dict(ODD_HEADS, num_hidden_layers=4, sliding_window=4, layer_types=[*MIXED, FULL],
                                   query_pre_attn_scalar=13)),
    "gemma3-linear": ("gemma3_text", dict(ODD_HEADS, sliding_window=4, layer_types=MIXED, rope_theta=5e4,
                                          rope_local_base_freq=300.0, query_pre_attn_scalar=20,
                                          rope_scaling=dict(rope_type="linear", factor=8.0))),
    "gemma3-pattern": ("gemma3_text", dict(ODD_HEADS, num_hidden_layers=4, sliding_window=6,
                                           sliding_window_pattern=2, attention_bias=True)),
    "gemma3-untied": ("gemma3_text", dict(ODD_HEADS, sliding_window=4, layer_types=[FULL] * 3,
                                          tie_word_embeddings=False)),
    "gemma3-vision": ("gemma3", dict(
        text_config=dict(ODD_HEADS, sliding_window=4, layer_types=MIXED, query_pre_attn_scalar=15,
                         rope_scaling=dict(rope_type="linear", factor=8.0)),
        vision_config=VISION, mm_tokens_per_image=4, image_token_index=82, boi_token_index=81,
        eoi_token_index=80)),

    "olmo2": ("olmo2", SMALL),
    "olmo2-bias": ("olmo2", dict(SMALL, attention_bias=True, tie_word_embeddings=True, rope_theta=5e5)),
    # transformers 5 has a base of 5e5 in the layers with a window, whatever a file of transformers 4 says.
    "olmo3": ("olmo3", dict(SMALL, sliding_window=5, layer_types=MIXED, rope_theta=5e5)),
    "olmo3-yarn": ("olmo3", dict(SMALL, sliding_window=5, layer_types=MIXED, rope_theta=5e5,
                                 rope_scaling=dict(YARN, beta_fast=2.0, attention_factor=1.2))),

    "granite": ("granite", dict(SMALL, embedding_multiplier=3.0, attention_multiplier=0.11,
                                residual_multiplier=0.22, logits_scaling=1.7, tie_word_embeddings=True)),
    "granite-biases": ("granite", dict(SMALL, embedding_multiplier=0.7, attention_multiplier=0.5,
                                       residual_multiplier=1.3, logits_scaling=0.6, attention_bias=True,
                                       mlp_bias=True)),
    "starcoder2": ("starcoder2", dict(SMALL, sliding_window=5)),
    "starcoder2-biasless": ("starcoder2", dict(SMALL, use_bias=False, tie_word_embeddings=False,
                                               norm_epsilon=1e-3)),
    "internlm3": ("internlm3", ODD_HEADS),
    "internlm3-biases": ("internlm3", dict(SMALL, head_dim=12, qkv_bias=True, bias=True)),
    "seed_oss": ("seed_oss", ODD_HEADS),
    "seed_oss-biases": ("seed_oss", dict(ODD_HEADS, attention_bias=False, attention_out_bias=True, mlp_bias=True)),

    "stablelm": ("stablelm", dict(SMALL, hidden_size=64, partial_rotary_factor=0.25, use_qkv_bias=True)),
    "stablelm-parallel": ("stablelm", dict(SMALL, partial_rotary_factor=0.5, use_parallel_residual=True)),
    "stablelm-norms": ("stablelm", dict(SMALL, hidden_size=64, partial_rotary_factor=0.25, qk_layernorm=True,
                                        use_qkv_bias=True, use_parallel_residual=True)),
    "gpt_neox": ("gpt_neox", neox(hidden_size=64)),
    "gpt_neox-half": ("gpt_neox", neox(rotary_pct=0.5, rotary_emb_base=3000, hidden_act="gelu_new")),
    "gpt_neox-two": ("gpt_neox", neox(hidden_size=32)),                         # Two numbers of a head rotate.
    "gpt_neox-odd": ("gpt_neox", neox()),                 # 12 * 0.25 = 3 rotated numbers, of which transformers makes 4
    "gpt_neox-whole": ("gpt_neox", neox(rotary_pct=1.0, tie_word_embeddings=True)),
    "gpt_neox-sequential": ("gpt_neox", neox(use_parallel_residual=False, hidden_size=64, attention_bias=False)),
    "arcee": ("arcee", ODD_HEADS),
    "arcee-yarn": ("arcee", dict(SMALL, head_dim=12, rope_scaling=YARN, attention_bias=True, mlp_bias=True)),
}

V5_ONLY = {"ministral3", "internlm3", "internlm3-biases", "opt-gelu", "phi3-longrope-factor", "stablelm-norms"}

# Reads {"folder": ..., "cases": {name: (model_type, arguments)}} from a file, and writes folder/name for each case:
# the checkpoint and oracle.pt: tokens (2, 23), logits (2, 23, V), prompt (2, 7), greedy (2, 27).
WRITE = r'''
import json, re, sys, torch, transformers
from pathlib import Path
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)                     # Two threads lose time on models of this size.
V5 = transformers.__version__.startswith("5")


def greedy(model, prompt):
    """20 greedy tokens with the cache, and how far the best of the logits stood from the second at least."""
    tokens, past, gap = prompt, None, float("inf")
    for _ in range(20):
        out = model(input_ids=tokens if past is None else tokens[:, -1:], past_key_values=past, use_cache=True)
        past, best = out.past_key_values, out.logits[:, -1].topk(2).values
        gap = min(gap, float((best[:, 0] - best[:, 1]).min()))
        tokens = torch.cat((tokens, out.logits[:, -1].argmax(-1)[:, None]), 1)
    return tokens, gap


def build(kind, arguments, seed):
    """The tiny model with noise in every parameter: so much in the blocks and the last norm that a tied head does not repeat its input."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **arguments})
    config._attn_implementation = "eager"
    if kind == "gemma3":
        config.text_config._attn_implementation = config.vision_config._attn_implementation = "eager"
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    for name, p in model.named_parameters():
        inside = re.search(r"\.\d+\.", name)
        if p.dim() == 1:
            noise = 0.3 if inside or name.endswith("bias") else 1.0
        else:
            noise = 0.2 if inside else 0.1
        p.data += noise * torch.randn_like(p)
    return model


@torch.no_grad()
def write(folder, kind, arguments):
    """The first seed whose greedy tokens leave no doubt and are no repetition of one."""
    for seed in range(50):
        model = build(kind, arguments, seed)
        vocab = model.get_input_embeddings().num_embeddings
        low, high = 3, vocab - 4 if kind == "gemma3" else vocab
        tokens = torch.randint(low, high, (2, 23), generator=torch.Generator().manual_seed(seed))
        prompt = tokens[:, :7].contiguous()
        text, gap = greedy(model, prompt)
        varied = max(len(set(row[7:])) for row in text.tolist())
        inside = kind != "gemma3" or text.max() < vocab - 4
        if gap > 2e-4 and varied >= 3 and inside:
            break
    else:
        raise SystemExit(f"{folder}: no seed gives greedy tokens that leave no doubt")
    whole = model(input_ids=text[:, :-1]).logits.argmax(-1)
    assert torch.equal(whole[:, 6:], text[:, 7:]), f"{folder}: the cache of transformers changes the text"
    logits = model(input_ids=tokens).logits
    assert logits.std() > 0.1 and logits.isfinite().all()
    model.save_pretrained(folder)
    torch.save({"tokens": tokens, "logits": logits, "prompt": prompt, "greedy": text}, Path(folder, "oracle.pt"))
    return seed


given = json.loads(Path(sys.argv[1]).read_text())
for name, (kind, arguments) in given["cases"].items():
    seed = write(Path(given["folder"], name), kind, arguments)
    print(name, "seed", seed, flush=True)
'''

# Reads a list of folders from a file. Leaves logits5.pt (or 4) of the folder's tokens.pt in each of them, or error5.txt
# where transformers refuses it, lacks a tensor or finds one too many.
READ = r'''
import json, sys, traceback, torch, transformers
from pathlib import Path
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
for folder in map(Path, json.loads(Path(sys.argv[1]).read_text())):
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        problems = {key: sorted(map(str, names)) for key, names in told.items() if names}
        assert not problems, problems
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.load(folder / "tokens.pt")).logits
        torch.save(logits, folder / f"logits{transformers.__version__[0]}.pt")
    except Exception:
        (folder / f"error{transformers.__version__[0]}.txt").write_text(traceback.format_exc())
'''
