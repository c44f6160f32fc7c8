"""The optimizer: AdamW with the recipe's parameter groups, its learning rates, its guard, and smaller states."""

from fastllava.optim.optim import FiniteGuard, build_optimizer, clip_gradients, gradient_norm, lr_factor, parameters, set_lr
