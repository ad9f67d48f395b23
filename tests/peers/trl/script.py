from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

PLACE = "BASE"
rows = load_dataset("json", data_files="data/pairs.jsonl", split="train[:3]")
lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", layers_to_transform=[0, 1])
arguments = DPOConfig(
    output_dir="out/preferred",
    beta=0.3,
    max_length=64,
    max_steps=20,
    per_device_train_batch_size=2,
    learning_rate=5e-6,
    lr_scheduler_type="polynomial",
    lr_scheduler_kwargs={"power": 2.0},
    save_strategy="epoch",
    bf16=True,
)
DPOTrainer(model=PLACE, args=arguments, train_dataset=rows, peft_config=lora).train()
