# a run on two GPUs, and a talk with what it made
export NPROC_PER_NODE=2
CUDA_VISIBLE_DEVICES=0,1 \
swift sft \
    --model BASE \
    --tuner_type lora \
    --dataset 'data/talk.jsonl#3' 'swift/self-cognition#100' \
    --split_dataset_ratio 0.1 \
    --torch_dtype bfloat16 \
    --num_train_epochs 2 \
    --per_device_train_batch_size 2 \
    --learning_rate 2e-4 \
    --lora_rank 16 \
    --target_modules q_proj v_proj \
    --gradient_accumulation_steps $(expr 16 / $NPROC_PER_NODE) \
    --save_steps 50 \
    --max_length 512 \
    --system 'Be brief.' \
    --warmup_ratio 0.05 \
    --model_author 'Somebody' \
    --model_name 'A robot' \
    --deepspeed zero2 \
    --output_dir runs/lora

CUDA_VISIBLE_DEVICES=0 \
swift infer \
    --adapters runs/lora/checkpoint-50 \
    --load_data_args true \
    --stream true --temperature 0 --max_new_tokens 64 --max_batch_size 1 --infer_backend transformers
