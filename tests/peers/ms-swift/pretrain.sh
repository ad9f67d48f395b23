swift pt \
    --model BASE --tuner_type full --dataset data/raw.jsonl --truncation_strategy split --max_length 64 --packing true \
    --per_device_train_batch_size 1 --learning_rate 1e-5 --max_steps 10 --weight_decay 0 --attn_impl flash_attn
