"""LoRA, QLoRA, and full fine-tuning."""
