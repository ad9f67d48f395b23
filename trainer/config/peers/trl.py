"""TRL: the keys of its scripts for SFT, DPO, KTO, ORPO and SimPO, in a YAML file or on a command line (version 1.16)."""

from trainer.config.peers import conversions as to
from trainer.config.peers import transformers
from trainer.config.peers.table import Needless, Peer, Row, To, Together, Unsupported, each

_GENERATION = "Objectives are sft, dpo, orpo, simpo and kto: no rewards, no generation while training, no distillation."
_NEEDLESS = each(
    Needless,
    {
        "Compiled data lies in the store, found by its content and used again by every run.": "dataset_streaming streaming dataset_batch_size "
        "dataset_kwargs shuffle_dataset preprocessing_num_workers env env.* dataset_configs",
        "Packed rows have one length and hold whole documents that never see each other.": "padding_free pad_to_multiple_of eval_packing "
        "packing_strategy pad_token padding_value label_pad_token_id precompute_ref_batch_size",
        "Code from the base's repository is never run.": "trust_remote_code ignore_bias_buffers bnb_4bit_quant_storage bnb_4bit_compute_dtype "
        "lora_task_type config config_file gradient_checkpointing_use_reentrant",
        "The chat template and the tokenizer say which token ends a text.": "eos_token",
        "Dropout of the base is off, and tuning.dropout is that of adapters.": "disable_dropout",
        "Logits are computed in chunks, where there is something to train.": "use_logits_to_keep",
    },
)
_UNSUPPORTED = each(
    Unsupported,
    {
        "The router's balancing loss is not added; routers stay frozen.": "router_aux_loss_coef",
        "The reference is the base itself: objective.reference.": "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
        _GENERATION: "generate_during_eval loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau cpo_alpha "
        "alpha rpo_alpha num_generations num_generations_eval temperature top_p top_k min_p generation_kwargs repetition_penalty "
        "cache_implementation use_vllm vllm_mode reward_model_name_or_path reward_funcs reward_weights num_iterations epsilon "
        "epsilon_high delta scale_rewards log_completions center_rewards_coefficient teacher_model_name_or_path "
        "mask_truncated_completions generation_batch_size steps_per_generation vllm_server_host vllm_server_port "
        "vllm_gpu_memory_utilization vllm_tensor_parallel_size importance_sampling_level cast_lm_head_to_fp32 "
        "ds3_gather_for_generation num_completions_to_print log_unique_prompts max_tool_calling_iterations",
        "Encoder-decoder models are not trained.": "is_encoder_decoder",
        "The classes and options of a base are its own files'.": "model_init_kwargs model_init_kwargs.* chat_template_kwargs",
        "The length of answers is not limited by itself.": "max_completion_length max_prompt_length",
        "Columns that the format does not name are left alone.": "datasets[].columns",
        "Data is named by its files: hf://owner/name/folder/*.": "datasets[].data_dir",
        "Layers are chosen by tuning.targets.": "lora_layers_to_transform",
    },
)
_MAPPED: dict[str, Row] = {
    "model_name_or_path": To("model.base", to.text),
    "num_processes": Together("cluster.workers"),
    "num_machines": Needless("Ranks find each other by themselves, under Ray, Slurm or torchrun."),
    "nproc_per_node": Together("cluster.workers"),
    "mixed_precision": To("model.dtype", to.dtype),
    "model_revision": To("model.revision", to.text),
    "dtype": To("model.dtype", to.dtype),
    "torch_dtype": To("model.dtype", to.dtype),
    "attn_implementation": To("model.attention", to.attention),
    "use_peft": Together("tuning.method"),
    "use_dora": Together("tuning.method"),
    "use_rslora": Together("tuning.method"),
    "lora_r": Together("tuning.rank"),
    "lora_alpha": Together("tuning.alpha"),
    "lora_dropout": Together("tuning.dropout"),
    "lora_target_modules": Together("tuning.targets"),
    "lora_target_parameters": Together("tuning.experts"),
    "lora_modules_to_save": Together("tuning.modules_to_save"),
    "load_in_4bit": Together("quant.type"),
    "load_in_8bit": Together("quant.type"),
    "bnb_4bit_quant_type": Together("quant.type"),
    "use_bnb_nested_quant": Together("quant.double"),
    "dataset_name": Together("data.train"),
    "dataset_config": Together("data.train"),
    "dataset_train_split": Together("data.train"),
    "dataset_test_split": Together("data.eval"),
    "dataset_text_field": Together("data.fields"),
    "dataset_mixer": Together("data.train"),
    "dataset_splits": Together("data.train"),
    "script": Together("objective.name"),
    "datasets": Together("data.train"),
    "datasets[].path": Together("data.train"),
    "datasets[].name": Together("data.train"),
    "datasets[].data_files": Together("data.train"),
    "datasets[].split": Together("data.train"),
    "datasets[].fraction": Together("data.train"),
    "test_split_size": To("data.held_out", to.held_out),
    "chat_template_path": To("data.template", to.text),
    "activation_offloading": To("train.activation_offload", to.flag),
    "max_length": To("data.sequence_length", to.whole),
    "max_seq_length": To("data.sequence_length", to.whole),
    "truncation_mode": Unsupported("A row that is too long keeps its beginning.", (None, "", "keep_start")),
    "packing": To("data.packing", to.flag),
    "completion_only_loss": Together("data.loss_on"),
    "assistant_only_loss": Together("data.loss_on"),
    "loss_type": Together("objective.loss_type"),
    "beta": To("objective.beta", to.number),
    "simpo_gamma": To("objective.gamma", to.number),
    "label_smoothing": To("objective.label_smoothing", to.number),
    "desirable_weight": To("objective.desirable_weight", to.number),
    "undesirable_weight": To("objective.undesirable_weight", to.number),
    "precompute_ref_log_probs": To("objective.reference", to.when({"objective.reference": "stored"})),
    "reference_free": Unsupported("dpo and kto have a reference; orpo and simpo have none."),
}
TRL = Peer(
    "trl",
    "TRL",
    {**transformers.ROWS, **_NEEDLESS, **_UNSUPPORTED, **_MAPPED},
    {
        **transformers.DEFAULTS,
        "gradient_checkpointing": True,
        "max_length": 1024,
        "packing": False,
        "output_dir": "trainer_output",
    },
    nullable=("max_length",),
)
