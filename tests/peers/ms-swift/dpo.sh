swift rlhf --rlhf_type dpo --model BASE --dataset data/pairs.jsonl --beta 0.2 --max_length 128 --use_rslora true \
    --quant_bits 4 --quant_method bnb --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \
    --num_train_epochs 1 --save_strategy no
