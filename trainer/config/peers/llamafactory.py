"""LLaMA-Factory: one YAML or JSON file of keys, with data sets named in dataset_info.json (its argument classes, version 0.9.5)."""

from trainer.config.peers import conversions as to
from trainer.config.peers import transformers
from trainer.config.peers.table import Needless, Peer, Row, To, Together, Unsupported, each

_NEEDLESS = each(
    Needless,
    {
        "The tokenizer's own chat template is taken; data.template names a file with another.": "template tool_format",
        "Compiled data lies in the store, found by its content and used again by every run.": "overwrite_cache preprocessing_batch_size "
        "preprocessing_num_workers tokenized_path data_shared_file_system streaming buffer_size ignore_pad_token_for_loss cache_dir",
        "Code from the base's or the data's repository is never run.": "trust_remote_code use_fast_tokenizer low_cpu_mem_usage device_map "
        "compute_dtype model_max_length block_diag_attn download_mode",
        "Tokens and keys come from the environment: HF_TOKEN.": "hf_hub_token ms_hub_token om_hub_token",
        "Kernels are Capstan's own choice; `capstan doctor` names them.": "enable_liger_kernel use_unsloth use_unsloth_gc use_reentrant_gc "
        "use_v1_kernels use_kv_cache upcast_layernorm upcast_lmhead_output print_param_status include_effective_tokens_per_second",
        "`capstan export` is a command of its own.": "export_dir export_size export_device export_legacy_format export_hub_model_id",
        "Answers are made by `capstan generate`, with options of its own.": "infer_backend infer_dtype offload_folder do_sample temperature top_p "
        "top_k num_beams max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens eval_num_beams "
        "predict_with_generate vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen "
        "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
        "Each of data.eval counts towards one loss; eval.sets give every set a loss of its own.": "eval_on_each_dataset",
        "Ray is started by `capstan train` and `submit ray`; its settings are cluster.ray.": "ray_run_name ray_storage_path "
        "ray_storage_filesystem placement_strategy resources_per_worker ray_init_kwargs master_addr master_port use_ray",
        "The step's times are in the metrics of every run.": "enable_torch_profiler profiler_output_dir profiler_wait_steps "
        "profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack "
        "profile_modules",
        "A quantized base is never whole on one device.": "quantization_device_map",
    },
)
_UNSUPPORTED = each(
    Unsupported,
    {
        "Images, video and audio are not read; of such a base the language model is trained.": "image_max_pixels image_min_pixels "
        "image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video "
        "audio_sampling_rate media_dir",
        "Of such a base the language model is trained, and nothing else.": "freeze_language_model",
        "Adapters start from LoRA's own initialisation.": "adapter_name_or_path adapter_folder pissa_init pissa_iter pissa_convert",
        "Not a method of ours: docs/methods.md lists them.": "use_llama_pro module_dropout oft_rank oft_block_size oft_target mixture_of_depths "
        "freeze_extra_modules train_from_scratch use_kt kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size",
        "Optimizers are adamw, adamw_8bit and adafactor.": "use_galore galore_target galore_rank galore_update_interval galore_scale "
        "galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj "
        "apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block "
        "badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose use_adam_mini use_muon",
        "The learning rate is the same for all that learns but LoRA+'s B matrices.": "loraplus_lr_embedding",
        "Objectives are sft, dpo, orpo, simpo and kto: no rewards, no generation while training.": "pref_ftx pref_bco_weight ppo_buffer_size "
        "ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model reward_model_adapters reward_model_quantization_bit "
        "reward_model_type ld_alpha use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha",
        "The reference is the base itself: objective.reference.": "ref_model ref_model_adapters ref_model_quantization_bit",
        "Neither positions nor attention of the base are changed.": "rope_scaling shift_attn",
        "The router's balancing loss is not added; routers stay frozen.": "moe_aux_loss_coef",
        "The vocabulary keeps its size but for model.add_tokens.": "resize_vocab split_special_tokens new_special_tokens_config "
        "init_special_tokens",
        "Quantization is nf4, fp4 or none (16 bits).": "fp8 fp8_backend fp8_enable_fsdp_float8_all_gather export_quantization_bit "
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen",
        "Megatron and other back ends are not used.": "use_mca use_hyper_parallel hyper_parallel_args",
        "The whole of a data set is read; data.train[].weight visits less of it in each epoch.": "max_samples",
        "data.train[].fraction gives a source its share of the tokens.": "interleave_probs",
        "The messages' text comes from the rows alone.": "default_system",
        "The run has one length; `capstan sweep` ends bad trials early.": "early_stopping_steps",
        "Evaluation measures the loss; `capstan evaluate` measures tasks.": "compute_accuracy task task_dir batch_size lang n_shot save_dir "
        "eval_batch_size",
        "Trackers are wandb, mlflow, trackio and TensorBoard.": "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode "
        "swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
    },
)
_MAPPED: dict[str, Row] = {
    "model_name_or_path": To("model.base", to.text),
    "model_revision": To("model.revision", to.text),
    "add_tokens": Together("model.add_tokens"),
    "add_special_tokens": Together("model.add_tokens"),
    "flash_attn": To("model.attention", to.attention),
    "quantization_bit": Together("quant.type"),
    "quantization_method": Together("quant.type"),
    "quantization_type": Together("quant.type"),
    "double_quantization": Together("quant.double"),
    "stage": Together("objective.name"),
    "finetuning_type": Together("tuning.method"),
    "use_dora": Together("tuning.method"),
    "use_rslora": Together("tuning.method"),
    "lora_rank": To("tuning.rank", to.whole),
    "lora_alpha": Together("tuning.alpha"),
    "lora_dropout": To("tuning.dropout", to.number),
    "lora_target": To("tuning.targets", to.targets),
    "additional_target": To("tuning.modules_to_save", to.names),
    "create_new_adapter": Needless("A run makes an adapter of its own."),
    "loraplus_lr_ratio": To("optim.lora_plus_ratio", to.number),
    "freeze_trainable_layers": Together("tuning.train"),
    "freeze_trainable_modules": Together("tuning.train"),
    "freeze_vision_tower": Needless("Of such a base the language model is trained."),
    "freeze_multi_modal_projector": Needless("Of such a base the language model is trained."),
    "pref_beta": To("objective.beta", to.number),
    "pref_loss": Together("objective.loss_type"),
    "dpo_label_smoothing": To("objective.label_smoothing", to.number),
    "kto_chosen_weight": To("objective.desirable_weight", to.number),
    "kto_rejected_weight": To("objective.undesirable_weight", to.number),
    "simpo_gamma": To("objective.gamma", to.number),
    "dataset": Together("data.train"),
    "eval_dataset": Together("data.eval"),
    "dataset_dir": Together("data.train"),
    "mix_strategy": Unsupported("Sources are mixed by data.train[].weight and fraction.", (None, "", "concat")),
    "val_size": To("data.held_out", to.held_out),
    "cutoff_len": To("data.sequence_length", to.whole),
    "train_on_prompt": Together("data.loss_on"),
    "mask_history": Together("data.loss_on"),
    "packing": Together("data.packing"),
    "neat_packing": Together("data.packing"),
    "enable_thinking": Needless("The chat template decides; data.thinking keeps or strips thinking."),
    "preserve_thinking": To("data.thinking", to.when({"data.thinking": "keep"})),
    "disable_gradient_checkpointing": To(
        "train.activation_checkpointing",
        to.when({"train.activation_checkpointing": False}, {"train.activation_checkpointing": True}),
    ),
    "pure_bf16": To("model.dtype", to.when({"model.dtype": "bf16"})),
    "ray_num_workers": Together("cluster.workers"),
    "num_processes": Together("cluster.workers"),
    "nproc_per_node": Together("cluster.workers"),
    "num_gpus": Together("cluster.workers"),
    "script": Needless("Every way to train is `capstan train`."),
    **each(
        Needless,
        {
            "Ranks find each other by themselves, under Ray, Slurm or torchrun.": "num_machines machine_rank main_process_ip main_process_port nnodes "
            "num_nodes node_rank rdzv_id rdzv_backend rdzv_endpoint standalone hostfile include exclude",
            "Where it runs is a part of the configuration: cluster.": "config_file",
        },
    ),
}
LLAMAFACTORY = Peer(
    "llamafactory",
    "LLaMA-Factory",
    {**transformers.ROWS, **_NEEDLESS, **_UNSUPPORTED, **_MAPPED},
    {
        **transformers.DEFAULTS,
        "cutoff_len": 2048,
        "lora_rank": 8,
        "lora_target": "all",
        "finetuning_type": "lora",
        "stage": "sft",
        "packing": False,
        "output_dir": "saves/run",
    },
)
