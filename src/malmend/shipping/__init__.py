"""An edit on its way to others: LoRA adapters, merged models, what two models or patches share."""
