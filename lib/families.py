"""
Which checkpoints there are: a row a family, in which names and constants alone say how its config.json and its
tensors' names map to a GPTConfig and a GPT. lib/checkpoint.py reads and writes by them.
"""

from dataclasses import dataclass, field, replace

# -----------------------------------------------------------------------------
# what a row says


@dataclass(frozen=True, eq=False)
class Family:
    """How one family's checkpoints say what a GPTConfig and a GPT hold.

    keys            key of config.json -> field of GPTConfig; where two keys name one field they must agree
    fixed           field of GPTConfig -> its value in all models of the family
    defaults        key -> its value where config.json lacks it; the other keys must be there
    required        key -> the only value that is supported, and the meaning of its absence
    biases          key -> the parts that have a bias where it is true, beside those of fixed
    switches        key -> the fields of GPTConfig where it is true
    windows         which layers see a window where layer_types does not say: "none", "all" and
                    nothing else can be said, all unless something else is "given", "late" ones (from max_window_layers
                    on), "unrotated" ones, or all but each nth, where this is n
    plain_windows   whether the layers with a window have no rotary scaling, and the base rope_local_base_freq where
                    the family has that key
    modules         their module outside the blocks -> ours
    block_modules   their module in a block -> ours, or several of ours that lie one on top of the other in theirs
    """
    name: str                     # model_type in config.json
    architecture: str             # the class in transformers, for `architectures`
    prefix: str                   # of every tensor but the head; the file of a base model may lack it
    blocks: str                   # the name of the list of blocks
    keys: dict
    fixed: dict
    defaults: dict
    modules: dict
    block_modules: dict
    required: dict = field(default_factory=dict)
    biases: dict = field(default_factory=dict)
    switches: dict = field(default_factory=dict)
    windows: str | int = "none"
    plain_windows: bool = False
    activations: dict = field(default_factory=dict)      # names that mean another function here
    rope_keys: dict = field(default_factory=dict)        # names of rotary keys here -> the usual ones
    scaled_embedding: bool = False      # whether embeddings are multiplied by sqrt(n_embd)
    head: str = "lm_head"         # their name of the head
    transposed: bool = False      # whether the linear layers of the blocks hold their weights as (in, out)
    interleaved: bool = False     # whether modules of several layers hold these by head

    def block(self, i):
        """The beginning of the names in block i."""
        return f"{self.prefix}{self.blocks}.{i}."


# -----------------------------------------------------------------------------
# rows

# What most rows share: keys of config.json, and modules of a block.
KEYS = {"vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head", "hidden_size": "n_embd", "tie_word_embeddings": "tied"}
GROUPED = KEYS | {"num_key_value_heads": "n_kv_head", "intermediate_size": "n_ffn", "head_dim": "head_dim"}
ATTENTION_BIAS = {"attention_bias": "q k v out"}
QKV = {"self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v"}
ATTENTION = QKV | {"self_attn.o_proj": "attn.out"}
GATED_FFN = {"mlp.gate_proj": "ffn.gate", "mlp.up_proj": "ffn.up", "mlp.down_proj": "ffn.down"}
NORMS = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
NORMS_AFTER = {"post_attention_layernorm": "after1", "post_feedforward_layernorm": "after2"}
QK_NORMS = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}

GPT2_KEYS = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head",
             "n_embd": "n_embd", "n_inner": "n_ffn", "activation_function": "activation",
             "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied"}
GPT2 = Family(
    name="gpt2", architecture="GPT2LMHeadModel", prefix="transformer.", blocks="h", transposed=True, keys=GPT2_KEYS,
    defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "n_inner": None},
    fixed={},
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    modules={"wte": "embed.tokens", "wpe": "embed.positions", "ln_f": "norm"},
    block_modules={"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attn.q attn.k attn.v",
                   "attn.c_proj": "attn.out", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"})
OPT = Family(
    name="opt", architecture="OPTForCausalLM", prefix="model.decoder.", blocks="layers",
    keys=KEYS | {"ffn_dim": "n_ffn", "activation_function": "activation", "word_embed_proj_dim": "n_embd"},
    fixed={"position_offset": 2, "bias": "norm"}, biases={"enable_bias": "q k v out up down"},
    defaults={"activation_function": "relu", "tie_word_embeddings": True, "enable_bias": True},
    required={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
    modules={"embed_tokens": "embed.tokens", "embed_positions": "embed.positions", "final_layer_norm": "norm"},
    block_modules=QKV | {"self_attn.out_proj": "attn.out", "fc1": "ffn.up", "fc2": "ffn.down",
                         "self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"})
LLAMA = Family(
    name="llama", architecture="LlamaForCausalLM", prefix="model.", blocks="layers",
    keys=GROUPED | {"hidden_act": "activation", "rms_norm_eps": "norm_eps"},
    fixed={"position": "rope", "norm": "rms", "gated": True, "bias": ""},
    defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
              "num_key_value_heads": None, "head_dim": None},
    required={"rope_interleaved": False},
    biases=ATTENTION_BIAS | {"mlp_bias": "gate up down"},
    modules={"embed_tokens": "embed.tokens", "norm": "norm"},
    block_modules=ATTENTION | GATED_FFN | NORMS)

ARCEE = replace(
    LLAMA, name="arcee", architecture="ArceeForCausalLM", fixed=LLAMA.fixed | {"gated": False},
    defaults=LLAMA.defaults | {"hidden_act": "relu2", "rms_norm_eps": 1e-5})
SEED_OSS = replace(
    LLAMA, name="seed_oss", architecture="SeedOssForCausalLM",
    defaults=LLAMA.defaults | {"head_dim": 128, "num_key_value_heads": 8, "attention_bias": True},
    biases={"attention_bias": "q k v", "attention_out_bias": "out", "mlp_bias": "gate up down"})
INTERNLM3 = replace(
    LLAMA, name="internlm3", architecture="InternLM3ForCausalLM",
    defaults=LLAMA.defaults | {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    biases={"qkv_bias": "q k v", "attention_bias": "q k v", "bias": "out gate up down",
            "mlp_bias": "out gate up down"})
SMOLLM3 = replace(
    LLAMA, name="smollm3", architecture="SmolLM3ForCausalLM", windows="unrotated",
    defaults=LLAMA.defaults | {"rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4,
                               "num_key_value_heads": 4})
GRANITE_SCALES = {"embedding_multiplier": "embed_scale", "attention_multiplier": "attention_scale",
                  "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}
GRANITE = replace(
    LLAMA, name="granite", architecture="GraniteForCausalLM", keys=LLAMA.keys | GRANITE_SCALES,
    defaults=LLAMA.defaults | dict.fromkeys(GRANITE_SCALES, 1.0))
MISTRAL = replace(
    LLAMA, name="mistral", architecture="MistralForCausalLM", windows="all", biases={},
    defaults=LLAMA.defaults | {"sliding_window": 4096, "num_key_value_heads": 8})
MINISTRAL = replace(MISTRAL, name="ministral", architecture="MinistralForCausalLM", windows="given")
MINISTRAL3 = replace(
    MISTRAL, name="ministral3", architecture="Ministral3ForCausalLM",
    # Without rope_parameters transformers has a yarn with numbers of its own; here they must be said.
    defaults=MISTRAL.defaults | {"head_dim": 128, "sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": None})
QWEN2 = replace(
    LLAMA, name="qwen2", architecture="Qwen2ForCausalLM", windows="late", biases={},
    fixed=LLAMA.fixed | {"bias": "q k v"},
    defaults=LLAMA.defaults | {"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32})
QWEN3 = replace(
    QWEN2, name="qwen3", architecture="Qwen3ForCausalLM", fixed=LLAMA.fixed | {"qk_norm": "head"},
    biases=ATTENTION_BIAS, defaults=QWEN2.defaults | {"head_dim": 128},
    block_modules=LLAMA.block_modules | QK_NORMS)
PHI3 = replace(
    LLAMA, name="phi3", architecture="Phi3ForCausalLM", windows="all", biases={},
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5, "sliding_window": None, "partial_rotary_factor": 1.0,
                               "original_max_position_embeddings": 4096},
    block_modules=NORMS | {"self_attn.qkv_proj": "attn.q attn.k attn.v", "self_attn.o_proj": "attn.out",
                           "mlp.gate_up_proj": "ffn.gate ffn.up", "mlp.down_proj": "ffn.down"})
GEMMA = replace(
    LLAMA, name="gemma", architecture="GemmaForCausalLM", scaled_embedding=True,
    fixed=LLAMA.fixed | {"norm_offset": 1.0}, biases=ATTENTION_BIAS,
    keys=LLAMA.keys | {"hidden_activation": "activation"}, activations={"gelu": "gelu_tanh"},
    defaults=LLAMA.defaults | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None, "head_dim": 256,
                               "num_key_value_heads": 16, "tie_word_embeddings": True})
GEMMA3_SHAPE = {"vocab_size": 262208, "max_position_embeddings": 131072, "num_hidden_layers": 26, "hidden_size": 2304,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216,
                "query_pre_attn_scalar": 256}
GEMMA3 = replace(
    GEMMA, name="gemma3_text", architecture="Gemma3ForCausalLM", windows=6, plain_windows=True,
    fixed=GEMMA.fixed | {"norm_place": "both", "qk_norm": "head"}, activations={},
    keys=GROUPED | {"hidden_activation": "activation", "rms_norm_eps": "norm_eps",
                    "query_pre_attn_scalar": "attention_scale"},
    defaults=GEMMA3_SHAPE | {
        "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "sliding_window": 4096, "tie_word_embeddings": True},
    block_modules=ATTENTION | QK_NORMS | GATED_FFN | NORMS_AFTER | {
        "input_layernorm": "norm1", "pre_feedforward_layernorm": "norm2"})
OLMO2 = replace(
    LLAMA, name="olmo2", architecture="Olmo2ForCausalLM", biases=ATTENTION_BIAS,
    fixed=LLAMA.fixed | {"norm_place": "after", "qk_norm": "width"},
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5},
    block_modules=ATTENTION | QK_NORMS | GATED_FFN | NORMS_AFTER)
OLMO3 = replace(
    OLMO2, name="olmo3", architecture="Olmo3ForCausalLM", windows=4, plain_windows=True,
    defaults=OLMO2.defaults | {"rope_theta": 500000.0, "sliding_window": 4096})
STARCODER2 = replace(
    LLAMA, name="starcoder2", architecture="Starcoder2ForCausalLM", windows="all",
    keys=GROUPED | {"hidden_act": "activation", "activation_function": "activation", "norm_epsilon": "norm_eps",
                    "layer_norm_epsilon": "norm_eps"},
    fixed={"position": "rope", "norm": "layer", "bias": "norm"}, biases={"use_bias": "q k v out up down"},
    defaults={"hidden_act": "gelu_pytorch_tanh", "activation_function": None, "norm_epsilon": 1e-5,
              "layer_norm_epsilon": None, "rope_theta": 10000.0, "head_dim": None, "tie_word_embeddings": True,
              "use_bias": True, "sliding_window": None},
    block_modules=ATTENTION | NORMS | {"mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"})
STABLELM = replace(
    LLAMA, name="stablelm", architecture="StableLmForCausalLM",
    keys=GROUPED | {"hidden_act": "activation", "layer_norm_eps": "norm_eps"},
    fixed=LLAMA.fixed | {"norm": "layer", "bias": "norm"}, biases={"use_qkv_bias": "q k v"},
    switches={"use_parallel_residual": {"parallel": True, "shared_norm": True}, "qk_layernorm": {"qk_norm": "heads"}},
    defaults={"hidden_act": "silu", "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
              "tie_word_embeddings": False, "head_dim": None},
    block_modules=LLAMA.block_modules | {"self_attn.q_layernorm": "attn.q_norm",
                                         "self_attn.k_layernorm": "attn.k_norm"})
GPT_NEOX = Family(
    name="gpt_neox", architecture="GPTNeoXForCausalLM", prefix="gpt_neox.", blocks="layers", head="embed_out",
    keys=KEYS | {"intermediate_size": "n_ffn", "hidden_act": "activation", "layer_norm_eps": "norm_eps"},
    fixed={"position": "rope", "bias": "up down norm"}, biases=ATTENTION_BIAS, interleaved=True,
    switches={"use_parallel_residual": {"parallel": True}},
    rope_keys={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
              "tie_word_embeddings": False, "attention_bias": True, "use_parallel_residual": True},
    modules={"embed_in": "embed.tokens", "final_layer_norm": "norm"},
    block_modules=NORMS | {"attention.query_key_value": "attn.q attn.k attn.v", "attention.dense": "attn.out",
                           "mlp.dense_h_to_4h": "ffn.up", "mlp.dense_4h_to_h": "ffn.down"})

ROWS = (GPT2, OPT, LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, QWEN2, QWEN3, PHI3, SMOLLM3, GEMMA, GEMMA3,
        OLMO2, OLMO3, GRANITE, STARCODER2, INTERNLM3, SEED_OSS, STABLELM, GPT_NEOX, ARCEE)
FAMILIES = {family.name: family for family in ROWS}

# -----------------------------------------------------------------------------
# words that differ from ours

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu",
               "gelu_python": "gelu", "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu"}
ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}

# keys whose value is not the field's -> what the field then is
CONVERSIONS = {"logits_scaling": lambda x: 1 / x, "query_pre_attn_scalar": lambda x: x**-0.5}
INVERSES = {"logits_scaling": lambda x: 1 / x, "query_pre_attn_scalar": lambda x: round(x**-2)}
