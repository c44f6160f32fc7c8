"""From LLaVA JSON and images to packed micro-batches; knows nothing of `fastllava.model`."""
