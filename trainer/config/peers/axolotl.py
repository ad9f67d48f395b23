"""axolotl: one YAML file of keys, with its data sets in a list (axolotl's config reference, version 0.19)."""

from trainer.config.peers import conversions as to
from trainer.config.peers import transformers
from trainer.config.peers.table import Needless, Peer, Row, To, Together, Unsupported, each

_CHAT = "The tokenizer's own chat template is taken; data.template names a file with another."
_PRECISION = "Capstan computes in bf16 or fp32. Left at bf16."

_NEEDLESS = each(
    Needless,
    {
        "transformers finds the classes of model and tokenizer by the base's own files.": "model_type tokenizer_type type_of_model "
        "base_model_config tokenizer_config cls_model_config tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common tokenizer_save_jinja_files "
        "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model overrides_of_model_kwargs "
        "mean_resizing_embeddings embeddings_skip_upcast low_cpu_mem_usage device device_map max_memory gpu_memory_limit "
        "experimental_skip_move_to_device qlora_sharded_model_loading lora_on_cpu tokens.*",
        "Code from the base's or the data's repository is never run.": "trust_remote_code datasets[].trust_remote_code "
        "test_datasets[].trust_remote_code pretraining_dataset[].trust_remote_code hf_use_auth_token",
        "Compiled data lies in the store, found by its content and used again by every run.": "dataset_prepared_path dataset_processes "
        "dataset_keep_in_memory skip_prepare_dataset num_dataset_shards_to_save push_dataset_to_hub is_preprocess preprocess_iterable "
        "streaming streaming_multipack_buffer_size pretrain_multipack_buffer_size pretrain_multipack_attn "
        "pretraining_sample_concatenation shuffle_merged_datasets shuffle_before_merging_datasets datasets[].preprocess_shards "
        "datasets[].ds_type test_datasets[].ds_type",
        "Packing needs no tuning: best fit, in windows of 64 blocks, rows of one length.": "sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially sample_packing_mp_start_method sample_packing_eff_est multipack_real_batches batch_flattening "
        "pad_to_sequence_len pad_to_multiple_of eval_sample_packing eval_sequence_len total_num_tokens total_supervised_tokens",
        "Kernels are Capstan's own choice; `capstan doctor` names them.": "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp "
        "flash_optimum cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks liger_rope liger_rms_norm "
        "liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy liger_fused_linear_cross_entropy "
        "liger_kernel_impl lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel flex_attn_compile_kwargs "
        "dpo_use_liger_kernel dpo_padding_free tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp use_kernels expert_backend "
        "use_scattermoe use_sonicmoe moe_grouped_backend experts_implementation fused_attn_kernel sdpa_varlen large_head_attention "
        "flash_attn_d512 gemma4_hybrid_attn_impl use_dsv4_kernels use_glm_dsa_kernels dsv4_bf16_all moe_bnb_fast moe_dequant_chunk_size quantize_moe_experts llama4_linearized_experts",
        "Plugins add code to axolotl; their own keys are listed by themselves.": "plugins strict trainer_cls axolotl_config_path",
        "A summary of what ran is part of every run's folder; see docs/tracking.md.": "profiler_steps profiler_steps_start gc_steps "
        "gc_collect_steps include_tkps use_tensorboard wandb_mode wandb_watch wandb_run_id wandb_log_model mlflow_tracking_uri "
        "hf_mlflow_log_artifacts",
        "`capstan export --merge` and `capstan generate` are commands of their own.": "merge_lora merge_method gradio_title gradio_share "
        "gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature early_stopping_threshold",
        "The newest commit is taken up by `capstan resume`.": "auto_resume_from_checkpoints save_first_step dynamic_checkpoint "
        "dynamic_checkpoint.*",
        "ZeRO-3 divides the model; `sharding.scope` says over which ranks.": "fsdp_version fsdp_final_state_dict_type dp_shard_size deepcompile "
        "fsdp_config.fsdp_version fsdp_config.sync_module_states fsdp_config.cpu_ram_efficient_loading fsdp_config.use_orig_params "
        "fsdp_config.cpu_offload_pin_memory fsdp_config.state_dict_type fsdp_config.final_state_dict_type fsdp_config.auto_wrap_policy "
        "fsdp_config.transformer_layer_cls_to_wrap fsdp_config.min_num_params fsdp_config.reshard_after_forward "
        "fsdp_config.mixed_precision_policy fsdp_config.*",
        "Padding is never trained or attended to.": "special_tokens.pad_token special_tokens.unk_token",
        "A LoRA layer knows how its base's weights lie.": "lora_fan_in_fan_out peft_autocast_adapter_dtype peft_ensure_weight_tying",
    },
)
_UNSUPPORTED = each(
    Unsupported,
    {
        "Images, video and audio are not read; of such a base the language model is trained.": "processor_type processor_kwargs image_size "
        "image_resize_algorithm role_boundaries freeze_mm_modules",
        "Quantization is nf4, fp4 or none (16 bits).": "gptq gptq_groupsize gptq_model_v1 fp8 fp8_config fp8_config.* fp8_enable_fsdp_float8_all_gather qat qat.* quantization "
        "quantization.* model_quantization_config model_quantization_config_kwargs use_onebitllms nonexpert_quantization "
        "dsv4_fp8_nonexpert_mode dsv4_fp4_grouped_mode gemma4_fp8_nonexpert gemma4_nf4_nonexpert nvfp4_merge_aware "
        "nvfp4_merge_aware_start_step bnb_config_kwargs llmcompressor llmcompressor.*",
        "Adapters start from LoRA's own initialisation, with one rank and alpha for all layers; tuning.experts_rank sets that of experts.": ""
        "lora_model_dir peft peft.* peft_init_lora_weights lora_rank_pattern lora_alpha_pattern peft_layer_replication "
        "peft_layers_to_transform peft_layers_pattern peft_trainable_token_indices mora mora.* use_mora",
        "Not a method of ours: docs/methods.md lists them.": "relora relora_prune_ratio relora_prune_method relora_cpu_offload relora_steps "
        "lisa_n_layers lisa_step_interval lisa_layers_attribute spectrum_top_fraction spectrum_model_name reinit_weights "
        "shrink_embeddings grokfast_alpha grokfast_lamb dense_mixer dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel",
        "The learning rate has one peak, one warm-up and one decay, the same for all that learns but LoRA+'s B matrices.": "embedding_lr "
        "embedding_lr_scale loraplus_lr_embedding lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor lr_groups "
        "jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps",
        "Optimizers are adamw, adamw_8bit and adafactor.": "torchdistx_path adam_epsilon2 adam_beta3 dion_lr dion_momentum dion_rank_fraction "
        "dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits "
        "qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size",
        "Objectives are sft, dpo, orpo, simpo and kto: no rewards, no generation while training, no distillation.": "reward_model "
        "process_reward_model center_rewards_coefficient num_labels trl trl.* vllm vllm.* ebft ebft.* kd_trainer kd_ce_alpha kd_alpha "
        "kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url kd_online_topk kd_online_server kd_online_timeout "
        "kd_temperature_min diffusion diffusion.* nemo_gym_enabled hatchery hatchery.* use_eaft eaft_alpha eaft_k noisy_embedding_alpha "
        "dpo_use_weighting dpo_loss_weights cpo_alpha rpo_alpha dpo_norm_loss liger_use_token_scaling nemo_gym_dir "
        "nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port nemo_gym_server_timeout nemo_gym_verify_timeout "
        "nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name nemo_gym_multi_turn nemo_gym_max_turns",
        "Neither positions nor attention of the base are changed.": "rope_scaling overrides_of_model_config use_pose pose_split_on_token_ids "
        "pose_max_context_len pose_num_chunks s2_attention scaling_softmax scaling_softmax_factor scaling_softmax_bias",
        "Tensor, sequence and expert parallelism do not exist here; ZeRO-3 divides every weight.": "sequence_parallel_degree "
        "context_parallel_size heads_k_stride ring_attn_func tensor_parallel_size expert_parallel_size expert_parallel_backend "
        "expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes expert_parallel_token_capacity "
        "expert_parallel_fallback_on_unsupported",
        "The run has one length and one measure of it; `capstan sweep` ends bad trials early.": "early_stopping_patience loss_watchdog_threshold "
        "loss_watchdog_patience curriculum_sampling min_sample_len max_prompt_len",
        "`capstan evaluate` measures tasks and `capstan generate` answers; eval.tasks and eval.prompts name them.": "do_causal_lm_eval "
        "eval_causal_lm_metrics do_bench_eval bench_dataset bench_split eval_table_size eval_max_new_tokens generate_samples "
        "num_generation_samples generation_max_new_tokens generation_temperature generation_top_p generation_top_k "
        "generation_prompt_ratio generation_do_sample dpo_generate_during_eval lm_eval_batch_size lm_eval_post_train lm_eval_model",
        "Trackers are wandb, mlflow, trackio and TensorBoard.": "use_comet comet_api_key comet_workspace comet_project_name "
        "comet_experiment_key comet_mode comet_online comet_experiment_config use_swanlab swanlab_project swanlab_experiment_name "
        "swanlab_description swanlab_mode swanlab_workspace swanlab_api_key swanlab_log_model swanlab_web_host swanlab_api_host "
        "swanlab_lark_webhook_url swanlab_lark_secret swanlab_log_completions swanlab_completion_log_interval "
        "swanlab_completion_max_buffer use_otel_metrics otel_metrics_host otel_metrics_port",
        "trackio writes to the place that its own environment variables name.": "trackio_space_id",
        "Names of accounts come from the environment: WANDB_ENTITY.": "wandb_entity",
        "Of activations the inputs of layers go to the host: train.activation_offload.": "layer_offloading selective_checkpointing "
        "selective_checkpointing.* ple_cpu_offload",
        "The vocabulary keeps its size but for model.add_tokens.": "resize_token_embeddings_to_32x fix_untrained_tokens added_tokens_overrides",
        "The messages' text comes from the rows alone.": "default_system_message chat_template_kwargs",
        "The whole of a data set is read; data.train[].weight visits less of it in each epoch.": "dataset_shard_num dataset_shard_idx "
        "datasets[].shards datasets[].shards_idx pretraining_dataset[].skip",
        "Duplicates are reported by `capstan data check`, and stay.": "dataset_exact_deduplication",
        "The fields of messages are role and content, or from and value; renames are data.fields.": "datasets[].input_transform "
        "datasets[].field_thinking datasets[].template_thinking_key datasets[].message_field_training_detail datasets[].split_thinking "
        "datasets[].logprobs_field datasets[].temperature datasets[].drop_system_message datasets[].input_format "
        "datasets[].step_separator datasets[].max_completion_length datasets[].train_on_last_step_only datasets[].field_human "
        "datasets[].field_model datasets[].conversation",
        "Normalisation layers keep the type that the family gives them.": "fp32_norms fp32_norm_classes",
    },
)
_SOURCE: dict[str, Row] = {
    "path": Together("data.train"),
    "name": Together("data.train"),
    "split": Together("data.train"),
    "revision": Together("data.train"),
    "data_files": Together("data.train"),
    "type": Together("data.train"),
    "type.*": Together("data.train"),
    "field": Together("data.train"),
    "field_messages": Together("data.train"),
    "field_tools": Together("data.train"),
    "field_chosen": Together("data.train"),
    "field_rejected": Together("data.train"),
    "text_column": Together("data.train"),
    "message_property_mappings": Together("data.train"),
    "message_field_role": Together("data.train"),
    "message_field_content": Together("data.train"),
    "message_field_training": Together("data.train"),
    "roles": Together("data.train"),
    "roles_to_train": Together("data.train_on.roles"),
    "train_on_eos": Together("data.train_on.end"),
    "train_on_eot": Together("data.train_on.end"),
    "chat_template": Needless(_CHAT),
    "chat_template_jinja": Together("data.template"),
}
_MAPPED: dict[str, Row] = {
    "base_model": To("model.base", to.text),
    "revision_of_model": To("model.revision", to.text),
    "adapter": Together("tuning.method"),
    "load_in_4bit": Together("quant.type"),
    "load_in_8bit": Together("quant.type"),
    "peft_use_dora": Together("tuning.method"),
    "peft_use_rslora": Together("tuning.method"),
    "lora_r": To("tuning.rank", to.whole),
    "lora_alpha": To("tuning.alpha", to.number),
    "lora_dropout": To("tuning.dropout", to.number),
    "lora_target_modules": To("tuning.targets", to.targets),
    "lora_target_linear": To("tuning.targets", to.when({"tuning.targets": "all-linear"})),
    "lora_target_parameters": To("tuning.experts", to.when({"tuning.experts": True})),
    "lora_modules_to_save": To("tuning.modules_to_save", to.names),
    "unfrozen_parameters": Together("tuning.train"),
    "tokens": Together("model.add_tokens"),
    "special_tokens.additional_special_tokens": Together("model.add_tokens"),
    "special_tokens.eos_token": Needless(
        "The base's tokenizer says which token ends a text, and the chat template which ends a turn."
    ),
    "special_tokens.bos_token": Needless("The base's tokenizer says which token begins a text."),
    "eot_tokens": Needless("The chat template says which token ends a turn."),
    "loraplus_lr_ratio": To("optim.lora_plus_ratio", to.number),
    "rl": Together("objective.name"),
    "rl_beta": To("objective.beta", to.number),
    "dpo_beta": To("objective.beta", to.number),
    "orpo_alpha": To("objective.beta", to.number),
    "simpo_gamma": To("objective.gamma", to.number),
    "dpo_label_smoothing": To("objective.label_smoothing", to.number),
    "dpo_loss_type": Together("objective.loss_type"),
    "dpo_use_logits_to_keep": Needless("Logits are computed in chunks, where there is something to train."),
    "precompute_ref_log_probs": To("objective.reference", to.when({"objective.reference": "stored"})),
    "kto_desirable_weight": To("objective.desirable_weight", to.number),
    "kto_undesirable_weight": To("objective.undesirable_weight", to.number),
    "sequence_len": To("data.sequence_length", to.whole),
    "max_packed_sequence_len": To("data.sequence_length", to.whole),
    "excess_length_strategy": To(
        "data.on_too_long",
        to.one_of({"drop": "drop", "truncate": "truncate", "raise": "fail"}, "it is drop, truncate or raise."),
    ),
    "sample_packing": To("data.packing", to.flag),
    "train_on_inputs": Together("data.loss_on"),
    "chat_template": Needless(_CHAT),
    "chat_template_jinja": Together("data.template"),
    "val_set_size": To("data.held_out", to.held_out),
    "datasets[].*": Unsupported("It is no key of a data set that Capstan knows."),
    **{f"datasets[].{key}": row for key, row in _SOURCE.items()},
    **{f"test_datasets[].{key}": row for key, row in _SOURCE.items()},
    **{f"pretraining_dataset[].{key}": row for key, row in _SOURCE.items()},
    "pretraining_dataset": Together("data.train"),
    "datasets": Together("data.train"),
    "test_datasets": Together("data.eval"),
    "num_epochs": To("train.epochs", to.passes),
    "micro_batch_size": To("train.micro_batch", to.whole),
    "activation_offloading": To("train.activation_offload", to.switched),
    "eval_batch_size": Needless("Evaluation takes train.micro_batch."),
    "batch_size": Together("train.global_batch"),
    "gradient_accumulation_steps": Together("train.global_batch"),
    "gradient_checkpointing": To("train.activation_checkpointing", to.switched),
    "optimizer": To("optim.name", to.optimizer),
    "lr_scheduler": To("optim.schedule", to.schedule),
    "cosine_min_lr_ratio": Together("optim.min_lr_ratio"),
    "evals_per_epoch": Together("eval.every"),
    "saves_per_epoch": Together("checkpoint.every_steps"),
    "lm_eval_tasks": To("eval.tasks", to.names),
    "bfloat16": To("model.dtype", to.when({"model.dtype": "bf16"})),
    "float32": To("model.dtype", to.when({"model.dtype": "fp32"})),
    "float16": Unsupported(_PRECISION),
    "flash_attention": To("model.attention", to.when({})),
    "sdp_attention": To("model.attention", to.when({"model.attention": "sdpa"})),
    "eager_attention": To("model.attention", to.when({"model.attention": "eager"})),
    "xformers_attention": Needless("model.attention: auto takes the fastest kernel that can run."),
    "flex_attention": Needless("model.attention: auto takes the fastest kernel that can run."),
    "sage_attention": Needless("model.attention: auto takes the fastest kernel that can run."),
    "attn_implementation": To("model.attention", to.attention),
    "torch_compile_options": Unsupported("The model is not compiled by torch.compile."),
    "use_wandb": Together("track.trackers"),
    "wandb_project": Together("track.project"),
    "wandb_name": Together("track.name"),
    "wandb_run_name": Together("track.name"),
    "use_mlflow": Together("track.trackers"),
    "mlflow_experiment_name": Together("track.project"),
    "mlflow_run_name": Together("track.name"),
    "use_trackio": Together("track.trackers"),
    "trackio_project_name": Together("track.project"),
    "trackio_run_name": Together("track.name"),
    "fsdp_config.offload_params": Together("sharding.deepspeed"),
    "fsdp_config.fsdp_offload_params": Together("sharding.deepspeed"),
    "fsdp_config.activation_checkpointing": To("train.activation_checkpointing", to.flag),
    "fsdp_config.fsdp_activation_checkpointing": To("train.activation_checkpointing", to.flag),
    "dp_replicate_size": Together("sharding.scope"),
    "use_ray": Needless("`capstan train` and `submit ray` start Ray."),
    "ray_run_name": Needless("run.name is the name of the run."),
    "ray_num_workers": Together("cluster.workers"),
    "resources_per_worker": Together("cluster.ray.resources"),
    "world_size": Together("cluster.workers"),
}
_BASE = {key: row for key, row in transformers.ROWS.items() if key not in ("fsdp_config", "optim", "lr_scheduler_type")}
AXOLOTL = Peer(
    "axolotl",
    "axolotl",
    {**_BASE, **_NEEDLESS, **_UNSUPPORTED, **_MAPPED},
    {
        "num_epochs": 1.0,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "lr_scheduler": "cosine",
        "sequence_len": 512,
        "sample_packing": False,
        "excess_length_strategy": "drop",
        "lora_dropout": 0.0,
        "seed": 42,
        "gradient_checkpointing": False,
        "output_dir": "./model-out",
    },
)
