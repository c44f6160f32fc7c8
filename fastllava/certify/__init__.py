"""The certificate of a run: its loss and gradients beside plain PyTorch's on padded batches, and both beside a more exact truth."""
