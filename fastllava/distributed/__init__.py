"""The processes of a run on one or several GPUs: how they agree, and how a model is sharded over them."""
