"""Keys of config.json that change nothing in what a model computes, and families that are out of scope."""

HARMLESS = set("""
    _name_or_path architectures attn_pdrop embd_pdrop resid_pdrop dropout attention_dropout
    activation_dropout layerdrop initializer_range model_type n_ctx bos_token_id eos_token_id pad_token_id
    sep_token_id decoder_start_token_id unk_token_id torch_dtype dtype transformers_version use_cache
    pretraining_tp prefix id2label label2id task_specific_params tokenizer_class summary_type
    summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels reorder_and_upcast_attn
    init_std _attn_implementation_autoset is_llama_config predict_special_tokens unsloth_fixed unsloth_version output_past gradient_checkpointing num_labels is_decoder auto_map transformers.js_config cache_implementation residual_dropout embedding_dropout hidden_dropout classifier_dropout is_encoder_decoder output_hidden_states output_attentions return_dict max_length do_sample temperature top_k top_p num_beams
    repetition_penalty length_penalty early_stopping no_repeat_ngram_size chunk_size_feed_forward
    diversity_penalty encoder_no_repeat_ngram_size min_length num_beam_groups num_return_sequences typical_p
    exponential_decay_length_penalty problem_type max_sequence_length full_attn_mod interpolate_factor
""".split())
OUT_OF_SCOPE = {}
