"""The objectives for `transformers.Trainer`:

    Trainer(model, ..., compute_loss_func=TrainerLoss(model, "emo1"))

Trainer calls the model without labels and hands what it returns to the loss. Where the logits would
be large, a hook on the model's output layer keeps the hidden states and lets the layer form none;
the loss then forms them a chunk at a time. No method of transformers is replaced.
"""

from megatron_emo.hf.trainer_loss import TrainerLoss

__all__ = ["TrainerLoss"]
