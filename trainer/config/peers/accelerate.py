"""accelerate: the YAML file of `accelerate config`, which says where something runs and nothing of what is trained."""

from trainer.config.peers import conversions as to
from trainer.config.peers.table import Needless, Peer, To, Together, Unsupported, each

_NEEDLESS = each(
    Needless,
    {
        "Ranks find each other by themselves, under Ray, Slurm or torchrun.": "machine_rank main_process_ip main_process_port rdzv_backend "
        "same_network main_training_function gpu_ids enable_cpu_affinity compute_environment debug mpirun_config mpirun_config.* "
        "deepspeed_config.deepspeed_hostfile deepspeed_config.deepspeed_multinode_launcher "
        "deepspeed_config.deepspeed_inclusion_filter deepspeed_config.deepspeed_exclusion_filter command_file commands",
        "ZeRO-3 divides the model over all ranks.": "distributed_type deepspeed_config.zero_stage deepspeed_config.zero3_init_flag "
        "deepspeed_config.zero3_save_16bit_model deepspeed_config.deepspeed_moe_layer_cls_names fsdp_config.*",
        "Capstan computes in bf16; only a TPU has this choice.": "downcast_bf16",
    },
)
_UNSUPPORTED = each(
    Unsupported,
    {
        "Capstan runs on GPUs and CPUs.": "tpu_name tpu_zone tpu_use_cluster tpu_use_sudo tpu_vm tpu_env ipex_config ipex_config.*",
        "Tensor, sequence and pipeline parallelism do not exist here; ZeRO-3 divides every weight.": "parallelism_config parallelism_config.* "
        "megatron_lm_config megatron_lm_config.*",
        "The model is not compiled by torch.compile.": "dynamo_config dynamo_config.*",
        "Quantization is nf4, fp4 or none (16 bits).": "fp8_config fp8_config.*",
        "What is offloaded goes to the host's memory.": "deepspeed_config.offload_optimizer_nvme_path deepspeed_config.offload_param_nvme_path",
        "Jobs are submitted to Slurm and Ray.": "ec2_instance_type iam_role_name image_uri profile region base_job_name pytorch_version "
        "transformers_version py_version sagemaker_inputs_file sagemaker_metrics_file additional_args",
    },
)
ACCELERATE = Peer(
    "accelerate",
    "accelerate",
    {
        **_NEEDLESS,
        **_UNSUPPORTED,
        "num_processes": Together("cluster.workers"),
        "num_machines": Together("cluster.slurm.nodes"),
        "mixed_precision": To(
            "model.dtype",
            to.one_of({"bf16": "bf16", "no": "fp32"}, "model.dtype is bf16 or fp32. Left at bf16."),
        ),
        "use_cpu": To("cluster.gpus_per_worker", to.when({"cluster.gpus_per_worker": 0})),
        "deepspeed_config": Together("sharding.deepspeed"),
        "fsdp_config": Together("sharding.deepspeed"),
        "deepspeed_config.offload_param_device": Together("sharding.deepspeed"),
        "deepspeed_config.offload_optimizer_device": Together("sharding.deepspeed"),
        "deepspeed_config.deepspeed_config_file": Together("sharding.deepspeed"),
        "deepspeed_config.gradient_accumulation_steps": Needless("The accumulation follows from train.global_batch."),
        "deepspeed_config.gradient_clipping": To("optim.grad_clip", to.number),
        "fsdp_config.fsdp_offload_params": Together("sharding.deepspeed"),
        "fsdp_config.fsdp_activation_checkpointing": To("train.activation_checkpointing", to.flag),
    },
)
