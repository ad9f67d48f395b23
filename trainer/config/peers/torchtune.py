"""torchtune: one YAML file whose sections name a component and its arguments (the recipes of version 0.6)."""

from trainer.config.peers import conversions as to
from trainer.config.peers.table import Needless, Peer, Row, To, Together, Unsupported, each

_NEEDLESS = each(
    Needless,
    {
        "The base is a Hugging Face directory: its own files say which they are.": "checkpointer._component_ checkpointer.checkpoint_files "
        "checkpointer.checkpoint_files.* checkpointer.model_type checkpointer.output_dir checkpointer.safe_serialization",
        "The tokenizer is that of the base.": "tokenizer._component_ tokenizer.path tokenizer.merges_file tokenizer.vocab_path "
        "tokenizer.merges_path",
        "`capstan resume` goes on from the newest commit, which holds what learns alone.": "resume_from_checkpoint save_adapter_weights_only "
        "checkpointer.recipe_checkpoint checkpointer.adapter_checkpoint checkpointer.keep_last_n_checkpoints checkpointer.enable_dcp "
        "enable_async_checkpointing",
        "Rows are read ahead in the background, in one order on any number of ranks.": "shuffle collate_fn dataloader dataloader.*",
        "Metrics are written to the run's folder at every step; see docs/tracking.md.": "metric_logger.log_dir log_peak_memory_stats log_level "
        "profiler profiler.*",
        "A rank reads its own share of the base only.": "low_cpu_ram memory_efficient_fsdp_wrap custom_sharded_layers fsdp_reshard_after_forward "
        "ac_mode ac_option fsdp data_parallel_shard_dim use_fp8_amax",
        "The step's memory is that of `capstan plan`.": "optimizer_in_bwd optimizer.fused optimizer.foreach loss.num_output_chunks "
        "loss.ignore_index chunked_loss",
        "The base's files say how its attention and embeddings are made.": "model.attn_dropout model.max_seq_len model.embed_dim "
        "model.num_layers model.num_heads model.num_kv_heads model.vocab_size model.intermediate_dim model.norm_eps model.rope_base",
    },
)
_UNSUPPORTED = each(
    Unsupported,
    {
        "The model is not compiled by torch.compile.": "compile compile.*",
        "Tensor and sequence parallelism do not exist here; ZeRO-3 divides every weight.": "tensor_parallel_dim tensor_parallel_plan "
        "tensor_parallel_plan.* context_parallel_dim data_parallel_replicate_dim enable_fp8_training fp8_recipe_name",
        "Objectives are sft, dpo, orpo, simpo and kto: no rewards, no generation while training, no distillation.": "kd_loss kd_loss.* kd_ratio "
        "teacher_model teacher_model.* teacher_checkpointer teacher_checkpointer.* policy_model policy_model.* reward_and_value_model "
        "reward_and_value_model.* reward_checkpointer.* value_checkpointer.* ref_policy_checkpointer.* ppo_epochs ppo_batch_size "
        "forward_batch_size gamma lmbda kl_coeff whiten_rewards penalise_no_eos reward_penalty min_response_length "
        "max_generated_tokens stop_token_ids temperature top_k loss.value_clip_range loss.value_coeff loss.epsilon num_steps",
        "The reference is the base itself: objective.reference.": "ref_checkpointer ref_checkpointer.*",
        "Quantization-aware training does not exist here; `capstan export` quantizes.": "quantizer quantizer.* fake_quant_after_n_steps",
        "Images are not read; of such a base the language model is trained.": "model.decoder_trainable model.encoder_trainable "
        "model.fusion_trainable model.image_size tokenizer.image_size image_size dataset.image_tag dataset.subset_image",
        "The prompt's text is that of the chat template.": "tokenizer.prompt_template dataset.prompt_template dataset.new_system_prompt "
        "tokenizer.truncation_type",
        "Rows are chosen before they get here.": "dataset.filter_fn dataset.filter_kwargs",
        "`capstan evaluate` and `generate` are commands of their own.": "tasks limit max_seq_length max_new_tokens enable_kv_cache prompt prompt.* "
        "include_path datasets",
    },
)
_SOURCE: dict[str, Row] = {
    key: Together("data.train")
    for key in (
        "_component_",
        "source",
        "split",
        "name",
        "subset",
        "data_files",
        "data_dir",
        "column",
        "column_map",
        "conversation_column",
        "conversation_style",
    )
} | {
    "packed": Together("data.packing"),
    "train_on_input": Together("data.loss_on"),
    "masking_strategy": Together("data.loss_on"),
    "add_eos": To("data.train_on.end", to.flag),
    "split_across_pack": Needless("A document that is too long follows data.on_too_long."),
    "max_seq_len": To("data.sequence_length", to.whole),
}
_MAPPED: dict[str, Row] = {
    "output_dir": To("run.name", to.run_folder),
    "seed": To("run.seed", to.whole),
    "model._component_": Together("tuning.method"),
    "model.lora_attn_modules": Together("tuning.targets"),
    "model.apply_lora_to_mlp": Together("tuning.targets"),
    "model.apply_lora_to_output": Together("tuning.targets"),
    "model.lora_rank": To("tuning.rank", to.whole),
    "model.lora_alpha": To("tuning.alpha", to.number),
    "model.lora_dropout": To("tuning.dropout", to.number),
    "model.use_dora": Together("tuning.method"),
    "model.quantize_base": Together("quant.type"),
    "checkpointer.checkpoint_dir": To("model.base", to.text),
    "tokenizer.max_seq_len": To("data.sequence_length", to.whole),
    "dataset": Together("data.train"),
    **{f"dataset.{key}": row for key, row in _SOURCE.items()},
    **{f"dataset[].{key}": row for key, row in _SOURCE.items()},
    "dataset_val": Together("data.eval"),
    **{f"dataset_val.{key}": Together("data.eval") for key in _SOURCE},
    "batch_size_val": Needless("Evaluation takes train.micro_batch."),
    "run_val_every_n_steps": Together("eval.every"),
    "batch_size": To("train.micro_batch", to.whole),
    "gradient_accumulation_steps": Together("train.global_batch"),
    "epochs": To("train.epochs", to.passes),
    "max_steps_per_epoch": Together("train.steps"),
    "optimizer._component_": Together("optim.name"),
    "optimizer.lr": To("optim.lr", to.number),
    "optimizer.weight_decay": To("optim.weight_decay", to.number),
    "optimizer.betas": To("optim.betas", to.pair),
    "optimizer.eps": To("optim.eps", to.number),
    "lr_scheduler._component_": Together("optim.schedule"),
    "lr_scheduler.num_warmup_steps": To("optim.warmup_steps", to.whole),
    "lr_scheduler.num_cycles": Unsupported("A cosine goes down once.", (None, 0.5)),
    "clip_grad_norm": To("optim.grad_clip", to.number),
    "loss._component_": Together("objective.name"),
    "loss": Together("objective.name"),
    "loss.beta": To("objective.beta", to.number),
    "loss.label_smoothing": To("objective.label_smoothing", to.number),
    "loss.gamma": To("objective.gamma", to.number),
    "dtype": To("model.dtype", to.dtype),
    "device": Together("cluster.gpus_per_worker"),
    "enable_activation_checkpointing": To("train.activation_checkpointing", to.flag),
    "enable_activation_offloading": To("train.activation_offload", to.flag),
    "fsdp_cpu_offload": Together("sharding.deepspeed"),
    "fsdp.cpu_offload": Together("sharding.deepspeed"),
    "log_every_n_steps": To("track.print_steps", to.whole),
    "metric_logger._component_": Together("track.trackers"),
    "metric_logger.project": Together("track.project"),
    "metric_logger.name": Together("track.name"),
    "metric_logger.group": Together("track.group"),
    "metric_logger.entity": Unsupported("Names of accounts come from the environment: WANDB_ENTITY."),
    "save_every_n_steps": To("checkpoint.every_steps", to.whole),
    "max_num_generations": Needless("Nothing is generated while training."),
}
TORCHTUNE = Peer(
    "torchtune",
    "torchtune",
    {**_NEEDLESS, **_UNSUPPORTED, **_MAPPED},
    {"epochs": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "enable_activation_checkpointing": False},
)
