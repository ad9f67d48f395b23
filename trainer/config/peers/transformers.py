"""The keys of transformers' `TrainingArguments`, which TRL and LLaMA-Factory take over and axolotl partly."""

from trainer.config.peers import conversions as to
from trainer.config.peers.table import Needless, Row, To, Together, Unsupported, each

NEEDLESS = each(
    Needless,
    {
        "Rows are tokenized once, read ahead in the background, and shuffled in one order on any number of ranks.": "dataloader_num_workers "
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "dataloader_drop_last remove_unused_columns label_names length_column_name group_by_length train_sampling_strategy "
        "accelerator_config split_batches dispatch_batches data_seed dataset_num_proc disable_shuffling",
        "ZeRO-3 divides the model and reduces its gradients; DDP does not run.": "ddp ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank average_tokens_across_devices world_size",
        "The section `timeouts` says how long ranks wait for each other.": "ddp_timeout",
        "Ranks, logs and metrics are handled by Capstan itself; see docs/tracking.md.": "log_level log_level_replica log_on_each_node "
        "logging_strategy logging_first_step logging_nan_inf_filter disable_tqdm logging_dir include_num_input_tokens_seen "
        "include_tokens_per_second include_for_metrics skip_memory_metrics plot_loss debug",
        "Evaluation adds up a loss a target token, without logits in memory.": "prediction_loss_only eval_do_concat_batches "
        "eval_use_gather_object eval_accumulation_steps batch_eval_metrics bf16_full_eval fp16_full_eval eval_on_start "
        "eval_delay do_eval",
        "`capstan train` trains, and `capstan resume` goes on from the newest commit.": "do_train resume_from_checkpoint ignore_data_skip "
        "restore_callback_states_from_checkpoint overwrite_output_dir",
        "A commit is complete whatever is asked for, and exists once in the store.": "save_only_model save_on_each_node save_safetensors "
        "enable_jit_checkpoint",
        "`capstan push` uploads a finished run, to whichever repository it is told, private by default.": "push_to_hub hub_model_id hub_strategy "
        "hub_token hub_private_repo hub_always_push hub_revision push_to_hub_model_id push_to_hub_organization push_to_hub_token",
        "Kernels are Capstan's own choice; `capstan doctor` names them.": "use_liger_kernel liger_kernel_config use_cache tf32 "
        "torch_empty_cache_steps gradient_checkpointing_kwargs activation_checkpointing_kwargs full_determinism",
        "The best checkpoint is that of the lowest evaluation loss.": "greater_is_better",
        "ZeRO-3 divides the model; `sharding.scope` says over which ranks.": "fsdp fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
    },
)
UNSUPPORTED = each(
    Unsupported,
    {
        "The micro-batch is fixed: `capstan plan` says what fits.": "auto_find_batch_size",
        "Noise on embeddings does not exist here.": "neftune_noise_alpha",
        "The model is not compiled by torch.compile.": "torch_compile torch_compile_backend torch_compile_mode",
        "Tensor, sequence and pipeline parallelism do not exist here; ZeRO-3 divides every weight.": "parallelism_config tp_size",
        "Optimizers take no arguments beyond the section `optim`.": "optim_args optim_target_modules",
        "Capstan computes in bf16 or fp32. Left at bf16.": "fp16 half_precision_backend fp16_opt_level",
        "`capstan evaluate` and `generate` predict.": "do_predict",
        "trackio writes to the place that its own environment variables name.": "trackio_space_id trackio_bucket_id trackio_static_space_id",
    },
)
MAPPED: dict[str, Row] = {
    "output_dir": To("run.name", to.run_folder),
    "seed": To("run.seed", to.whole),
    "learning_rate": To("optim.lr", to.number),
    "weight_decay": To("optim.weight_decay", to.number),
    "adam_beta1": Together("optim.betas"),
    "adam_beta2": Together("optim.betas"),
    "adam_epsilon": To("optim.eps", to.number),
    "max_grad_norm": To("optim.grad_clip", to.number),
    "lr_scheduler_type": To("optim.schedule", to.schedule),
    "lr_scheduler_kwargs": Together("optim.min_lr_ratio"),
    "warmup_ratio": To("optim.warmup_ratio", to.warmup_ratio),
    "warmup_steps": To("optim.warmup_steps", to.warmup),
    "optim": To("optim.name", to.optimizer),
    "num_train_epochs": To("train.epochs", to.passes),
    "max_steps": Together("train.steps"),
    "per_device_train_batch_size": To("train.micro_batch", to.whole),
    "gradient_accumulation_steps": Together("train.global_batch"),
    "per_device_eval_batch_size": Needless("Evaluation takes train.micro_batch."),
    "gradient_checkpointing": To("train.activation_checkpointing", to.flag),
    "activation_checkpointing": To("train.activation_checkpointing", to.flag),
    "bf16": To("model.dtype", to.when({"model.dtype": "bf16"})),
    "label_smoothing_factor": To("objective.label_smoothing", to.number),
    "logging_steps": To("track.print_steps", to.steps),
    "report_to": To("track.trackers", to.trackers),
    "run_name": Together("track.name"),
    "project": Together("track.project"),
    "eval_steps": Together("eval.every"),
    "eval_strategy": Together("eval.every"),
    "evaluation_strategy": Together("eval.every"),
    "save_strategy": Together("checkpoint.every_steps"),
    "save_steps": Together("checkpoint.every_steps"),
    "save_total_limit": To("checkpoint.keep_last", to.whole),
    "load_best_model_at_end": Together("checkpoint.keep_best"),
    "metric_for_best_model": Unsupported(
        "Checkpoints are compared by the evaluation loss.", (None, "", "loss", "eval_loss")
    ),
    "deepspeed": Together("sharding.deepspeed"),
    "fsdp_config": Together("sharding.deepspeed"),
    "use_cpu": To("cluster.gpus_per_worker", to.when({"cluster.gpus_per_worker": 0})),
    "no_cuda": To("cluster.gpus_per_worker", to.when({"cluster.gpus_per_worker": 0})),
}
ROWS: dict[str, Row] = {**NEEDLESS, **UNSUPPORTED, **MAPPED}
DEFAULTS = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "seed": 42,
}
