# The command of TRL's documentation, on four processes.
accelerate launch --num_processes 4 trl/scripts/dpo.py \
    --dataset_name data/pairs.jsonl \
    --model_name_or_path BASE \
    --learning_rate 5.0e-6 \
    --max_steps 100 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --beta 0.3 --loss_type hinge \
    --no_remove_unused_columns \
    --output_dir=dpo-out \
    --use_peft --lora_r 8 --lora_alpha 16 --lora_target_modules q_proj v_proj
