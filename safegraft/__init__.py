"""safegraft: repair the safety of fine-tuned LoRA adapters, after the fine-tuning and without training."""

__version__ = "0.1.0"
