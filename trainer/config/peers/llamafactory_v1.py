"""LLaMA-Factory's second trainer, whose keys and sections are others than those of the first (its folder v1, version 0.9.5)."""

from trainer.config.peers import conversions as to
from trainer.config.peers.table import Needless, Peer, To, Together, Unsupported, each

LLAMAFACTORY_V1 = Peer(
    "llamafactory-v1",
    "LLaMA-Factory v1",
    {
        **each(
            Needless,
            {
                "transformers finds the classes of model and tokenizer by the base's own files.": "model_class trust_remote_code "
                "init_config init_config.*",
                "The tokenizer's own chat template is taken; data.template names a file with another.": "template",
                "Kernels are Capstan's own choice; `capstan doctor` names them.": "kernel_config kernel_config.* full_determinism",
                "ZeRO-3 divides the model; `sharding.scope` says over which ranks.": "dist_config dist_config.*",
                "Answers are made by `capstan generate`, with options of its own.": "sample_backend max_new_tokens",
                "`capstan resume` goes on from the newest commit, and `capstan export` writes other formats.": "resume_from_checkpoint "
                "save_ckpt_as_hf peft_config.export_dir peft_config.export_size peft_config.export_hub_model_id peft_config.infer_dtype "
                "peft_config.export_legacy_format batching_workers",
            },
        ),
        **each(
            Unsupported,
            {
                "Adapters start from LoRA's own initialisation.": "peft_config.adapter_name_or_path",
                "What learns is named by tuning.train, in patterns.": "peft_config.freeze_trainable_layers "
                "peft_config.freeze_trainable_modules peft_config.freeze_extra_modules peft_config.cast_trainable_params_to_fp32",
                "checkpoint.every_steps is a number of steps.": "save_epochs",
                "Optimizers are adamw, adamw_8bit and adafactor, with the settings of the section `optim`.": "optim_config optim_config.*",
                "The quantization is that of bitsandbytes in 4 bits.": "quant_config.*",
            },
        ),
        "model": To("model.base", to.text),
        "flash_attn": To("model.attention", to.attention),
        "train_dataset": Together("data.train"),
        "eval_dataset": Together("data.eval"),
        "output_dir": To("run.name", to.run_folder),
        "micro_batch_size": To("train.micro_batch", to.whole),
        "global_batch_size": To("train.global_batch", to.whole),
        "cutoff_len": To("data.sequence_length", to.whole),
        "learning_rate": To("optim.lr", to.number),
        "num_train_epochs": To("train.epochs", to.passes),
        "max_steps": Together("train.steps"),
        "max_grad_norm": To("optim.grad_clip", to.number),
        "bf16": To("model.dtype", to.when({"model.dtype": "bf16"})),
        "batching_strategy": Together("data.packing"),
        "enable_activation_checkpointing": To("train.activation_checkpointing", to.flag),
        "lr_scheduler_config.name": To("optim.schedule", to.schedule),
        "lr_scheduler_config.*": Unsupported("Schedules have optim.warmup_steps and optim.min_lr_ratio alone."),
        "seed": To("run.seed", to.whole),
        "save_steps": To("checkpoint.every_steps", to.steps),
        "save_total_limit": To("checkpoint.keep_last", to.whole),
        "logging_steps": To("track.print_steps", to.whole),
        "peft_config.name": Together("tuning.method"),
        "peft_config.r": To("tuning.rank", to.whole),
        "peft_config.lora_alpha": To("tuning.alpha", to.number),
        "peft_config.lora_dropout": To("tuning.dropout", to.number),
        "peft_config.target_modules": To("tuning.targets", to.targets),
        "peft_config.use_rslora": Together("tuning.method"),
        "peft_config.use_dora": Together("tuning.method"),
        "peft_config.modules_to_save": To("tuning.modules_to_save", to.names),
        "quant_config.name": Together("quant.type"),
        "quant_config.quantization_bit": Together("quant.type"),
        "quant_config.quantization_type": Together("quant.type"),
        "quant_config.double_quantization": Together("quant.double"),
    },
    {
        "num_train_epochs": 3,
        "micro_batch_size": 1,
        "cutoff_len": 2048,
        "learning_rate": 1e-4,
        "enable_activation_checkpointing": True,
        "seed": 42,
        "output_dir": "outputs/run",
        "peft_config.r": 8,
        "peft_config.lora_alpha": 16,
        "peft_config.lora_dropout": 0.05,
    },
)
