"""
What is known of config.json's keys beyond those that lib/families.py reads: which of them change nothing,
which only at one value, and which say that a model is none of ours. It is plain data, gathered from the
published files of the families and from what transformers 4.57 and 5.23 write and read.
"""

# -----------------------------------------------------------------------------
# keys that change nothing in what a model computes when it is trained without dropout and when it generates

DROPOUT = """
    activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout
    dropout embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob layerdrop resid_pdrop
    residual_dropout summary_first_dropout
"""
TOKENS = """
    begin_suppress_tokens bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id
    forced_eos_token_id pad_token_id predict_special_tokens prefix sep_token_id suppress_tokens
    tokenizer_class unk_token_id
"""
GENERATION = """
    bad_words_ids cache_implementation diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_past output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate temperature top_k top_p typical_p
    use_cache
"""
INITIALIZATION = "init_std initializer_range"
OTHER_HEADS = """
    _num_labels finetuning_task id2label label2id num_labels problem_type summary_activation
    summary_proj_to_labels summary_type summary_use_proj task_specific_params
"""
HOW_IT_RUNS = """
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled attention_softmax_in_fp32
    attn_implementation chunk_size_feed_forward gradient_checkpointing output_attentions
    output_hidden_states pretraining_tp reorder_and_upcast_attn return_dict
    scale_attention_softmax_in_fp32 tf_legacy_loss torchscript use_bfloat16
"""
NOTES = """
    _commit_hash _name_or_path architectures auto_map dtype is_decoder is_llama_config
    max_sequence_length model_type n_ctx torch_dtype transformers.js_config transformers_version
    unsloth_fixed unsloth_version
"""
HARMLESS = {key for keys in (DROPOUT, TOKENS, GENERATION, INITIALIZATION, OTHER_HEADS, HOW_IT_RUNS, NOTES)
            for key in keys.split()}

# -----------------------------------------------------------------------------
# keys that change nothing at one value only -> that value; null, false and what is empty need no line

HARMLESS_AT = {
    "full_attn_mod": 1,                  # Phi-4-mini: each such layer sees all tokens
    "interpolate_factor": 1,             # Phi-4-mini: positions are not interpolated
    "is_causal": True,                   # transformers 5: false lets a token see those after it
    "mlp_type": "default",               # StarCoder2
    "norm_type": "layer_norm",           # StarCoder2
    "rotary_scaling_factor": 1.0,        # StableLM 2
    "scale_attn_weights": True,          # StarCoder2, GPT-2
}

# -----------------------------------------------------------------------------
# keys that make a model one that is out of scope -> what it then has

OUT_OF_SCOPE_KEYS = {key: reason for reason, keys in {
    "a mixture of experts": """
        moe_intermediate_size moe_num_experts n_routed_experts num_experts num_experts_per_tok
        num_local_experts""",
    "latent attention": "kv_lora_rank q_lora_rank",
    "score caps": "attn_logit_softcapping",
    "caps of the logits": "final_logit_softcapping",
    "caps of queries, keys and values": "clip_qkv",
    "attention to later tokens": "use_bidirectional_attention",
    "attention to another model": "add_cross_attention cross_attention_hidden_size is_encoder_decoder",
    "ALiBi positions": "alibi",
    "attention in chunks": "attention_chunk_size",
    "fewer heads in some layers": "pruned_heads",
    "a bias of the head": "lm_head_bias",
    "rotary positions of three axes": "mrope_section use_mrope",
}.items() for key in keys.split()}

# -----------------------------------------------------------------------------
# keys of weights that lie in another library's quantized form -> its name where the value does not say it

QUANTIZED = {"quantization": "mlx", "compression_config": "compressed-tensors",
             "quantization_config": "an unknown method"}

# -----------------------------------------------------------------------------
# model_type -> what such models have and this code does not

OUT_OF_SCOPE = {kind: reason for reason, kinds in {
    "a mixture of experts": """
        afmoe arctic aria_text beam cohere2_moe dbrx deepseek deepseek_v4 dots1 ernie4_5_moe
        ernie4_5_vl_moe ernie4_5_vl_moe_text exaone_moe flex_olmo flint glm4_moe glm4v_moe
        glm4v_moe_text gpt_oss granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 jetmoe
        kolibri1 laguna llama4 llama4_text mellum mimo_v2_flash minimax_m2 minimax_m3_vl
        minimax_m3_vl_text mixtral muse_spark muse_spark_text olmoe phimoe qwen2_moe qwen3_moe
        qwen3_omni_moe qwen3_omni_moe_text qwen3_vl_moe qwen3_vl_moe_text solar_open step3p5 zaya""",
    "latent attention": """
        axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note dots3_note_text glm4_moe_lite
        glm5_next glm5_next_text glm_moe_dsa hy_v4 kimi_k2 longcat_flash minicpm3 mistral4
        mistral_large4 mistral_large4_text youtu""",
    "linear or hybrid attention": """
        bailing_hybrid kimi_linear minimax olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
        qwen3_next qwen4_exp qwen4_exp_text""",
    "layers of a state-space model": """
        bamba falcon_h1 falcon_mamba granitemoehybrid jamba mamba mamba2 nemotron_h zamba zamba2""",
    "recurrent layers": "mega recurrent_gemma rwkv xlstm",
    "layers that run several times": "hrm_text",
    "convolutions": "inkling2_text inkling_text lfm2 lfm2_moe lfm3",
    "ALiBi positions": "bloom jais mpt",
    "ALiBi positions, or heads fused by group in the file": "RefinedWeb RefinedWebModel falcon",
    "relative positions": "cpmant transfo-xl xlnet",
    "sinusoidal positions": "ctrl musicgen musicgen_melody xglm",
    "rotation of neighbours in a head": "chatglm codegen cohere cohere2 ernie4_5 glm glm4 gptj helium",
    "rotary positions of three axes": """
        cohere_compass_text glm4v glm4v_text qwen2_5_vl qwen2_5_vl_text qwen2_vl qwen2_vl_text qwen3_vl
        qwen3_vl_text""",
    "score caps": "gemma2 vaultgemma",
    "caps of the logits": "muse_glimmer muse_glimmer_text nanochat",
    "embeddings for each layer": "gemma3n gemma3n_text",
    "norms of the values": "gemma4 gemma4_text gemma4_unified gemma4_unified_text",
    "differential attention": "diffllama",
    "masks made of the values": "doge",
    "hashed attention": "reformer",
    "attention sinks": "granite_swa",
    "norms inside attention and FFN": "bitnet",
    "norms without weights": "olmo",
    "norms of q and k after the rotation": "hunyuan_v1_dense",
    "norms of q and k with biases": "persimmon",
    "norms of the sum": "openai-gpt",
    "the activation xIELU": "apertus",
    "a bias of the head": "mixformer-sequential phi phi-msft",
    "a bias in the last layer alone": "gpt_neox_japanese",
    "layers of different shapes": "nemotron-nas openelm",
    "attention to pictures": "mllama mllama_text_model",
    "pictures beside the text": "emu3 emu3_text_model fuyu git got_ocr2 imagegpt phi4_multimodal",
    "sound beside the text": "moshi moss_transcribe_diarize",
    "patches of bytes": "blt",
    "a norm of the embeddings": "modernbert-decoder",
    "another model to draft for": "gemma4_assistant gemma4_unified_assistant",
    "an encoder and a decoder": """
        bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian
        mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet speech_to_text speech_to_text_2
        switch_transformers t5 t5gemma t5gemma2 trocr umt5 whisper xlm-prophetnet""",
    "an encoder": """
        albert bert bert-generation big_bird camembert data2vec-text deberta deberta-v2 distilbert
        electra ernie esm eurobert fnet funnel ibert longformer megatron-bert mobilebert modernbert
        mpnet nomic_bert nystromformer qdqbert rembert roberta roberta-prelayernorm roc_bert roformer
        squeezebert xlm xlm-roberta xlm-roberta-xl xmod yoso""",
}.items() for kind in kinds.split()}
