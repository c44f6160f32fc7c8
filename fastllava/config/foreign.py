"""Keys that people know from elsewhere: the original LLaVA's arguments, transformers' TrainingArguments and DeepSpeed's config.

A name that is a key here too, such as max_grad_norm, needs no entry.
"""

from collections.abc import Mapping

SAME: Mapping[str, str] = {
    # LLaVA
    "model_name_or_path": "model.llm",
    "mm_vision_tower": "model.vision_tower",
    "mm_projector_type": "model.projector_type",
    "mm_vision_select_layer": "model.select_layer",
    "pretrain_mm_mlp_adapter": "model.projector",
    "data_path": "data.records",
    "image_folder": "data.images",
    "image_aspect_ratio": "data.image_policy",
    "version": "data.template",
    "model_max_length": "data.max_tokens",
    "group_by_modality_length": "data.group_by_modality",
    "mm_projector_lr": "optim.projector_lr",
    # transformers
    "tokenizer_name": "model.tokenizer",
    "dataloader_num_workers": "data.workers",
    "max_seq_length": "data.max_tokens",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "num_train_epochs": "train.epochs",
    "data_seed": "train.seed",
    "lora_weight_path": "model.adapter",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.targets",
    "lora_target_modules": "lora.targets",
    "target_modules": "lora.targets",
    "torch_compile": "train.compile",
    "full_determinism": "train.deterministic",
    "torch_compile_mode": "train.compile",
    "save_steps": "train.checkpoint_steps",
    "save_total_limit": "train.keep_checkpoints",
    "report_to": "log.backends",
    "eval_steps": "eval.every_steps",
    "val_data_path": "eval.held_out",
    "eval_data_path": "eval.held_out",
    "validation_file": "eval.held_out",
    "validation_split_percentage": "eval.held_out",
    # DeepSpeed
    "train_batch_size": "train.global_batch",
    "gradient_clipping": "optim.max_grad_norm",
}
"""The key here that means the same as a foreign one; its values may be written otherwise."""


def _each(names: str, sentence: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), sentence)


_BATCH = (
    "write train.global_batch, the samples of one optimizer step: samples a device x devices x accumulation steps "
    "(16 x 8 x 1 = 128 in the original's stage 2); train.micro_batch_tokens says how much of it a GPU takes at a time"
)
_PRECISION = "write train.precision=bf16, which keeps fp32 master weights, or train.precision=fp32; fp16 is not offered"
_SHARDING = "leave it out: under torchrun FSDP2 shards weights, gradients and optimizer state over the GPUs, and parallel.* says how"
_LOGGING = "leave it out: every step is a line of metrics.jsonl in output_dir; log.backends adds TensorBoard, W&B or trackio"
_LORA = "write lora.rank, which trains adapters in place of the language model; lora.alpha, lora.dropout and lora.targets go with it"
_QUANTISED = "write model.quantize=nf4, or nf4_double, whose scales are quantised too; it wants adapters (lora.rank)"
_EVALUATION = "write eval.held_out and eval.every_steps: the held-out loss before the first step, every so many steps and at the end"
_MEASURES = "leave it out: eval.held_out gives the held-out loss and eval.samples gives answers; fastllava score scores them on benchmarks"
_LAST_MODEL = "leave it out: a run ends with its last weights; train.keep_checkpoints keeps earlier ones beside their held-out loss"
_FROZEN_TOWER = "leave it out: the vision tower is frozen in both stages"
_OPTIMIZER = (
    "leave it out: the optimizer is AdamW, and its numbers are optim.lr, optim.weight_decay, optim.beta1, optim.beta2 and optim.eps"
)
_PROFILE = "leave it out: metrics.jsonl has each step's times and operations, and fastllava bench step --profile DIR writes a table of them"

INSTEAD: Mapping[str, str] = {
    # LLaVA
    "tune_mm_mlp_adapter": "write stage=pretrain, which trains the projector alone",
    "freeze_backbone": "write stage=pretrain, which freezes the language model, or stage=finetune, which trains it",
    "freeze_mm_mlp_adapter": "leave it out: both stages train the projector",
    "mm_tunable_parts": "write stage=pretrain, which trains the projector, or stage=finetune, which trains projector and language model",
    **_each("unfreeze_mm_vision_tower mm_vision_tower_lr", _FROZEN_TOWER),
    "mm_vision_select_feature": "leave it out: the projector gets the patches, without the class token",
    "mm_patch_merge_type": "leave it out: an image is its patches, row by row",
    **_each("mm_use_im_start_end mm_use_im_patch_token", "leave it out: as in LLaVA-1.5, no token of the vocabulary stands for an image"),
    "lazy_preprocess": "leave it out: records are prepared once, and images are decoded when they are needed",
    "is_multimodal": "leave it out: records with and without an image may be mixed",
    "cache_dir": "leave it out: models are folders, and data.prepared_dir says where prepared sets are kept",
    "mpt_attn_impl": "leave it out: kernels.attention chooses",
    "lora_enable": _LORA,
    "lora_bias": "leave it out: adapters have no bias",
    **_each("double_quant quant_type bits load_in_4bit load_in_8bit", _QUANTISED),
    # transformers
    **_each("per_device_train_batch_size gradient_accumulation_steps", _BATCH),
    "auto_find_batch_size": "leave it out: fastllava plan foresees what fits, and train.micro_batch_tokens sets it",
    "gradient_checkpointing": "write train.recompute=full for true and train.recompute=none for false; norms and selective lie between",
    **_each("gradient_checkpointing_kwargs activation_checkpointing_kwargs", "leave it out: train.recompute says what is computed again"),
    **_each("bf16 fp16 fp16_opt_level half_precision_backend torch_dtype", _PRECISION),
    **_each("do_eval do_predict evaluation_strategy eval_strategy eval_on_start", _EVALUATION),
    **_each("per_device_eval_batch_size eval_accumulation_steps", "leave it out: train.micro_batch_tokens packs held-out records too"),
    **_each("bf16_full_eval fp16_full_eval", "leave it out: the model computes in train.precision, in training and in evaluation"),
    **_each("load_best_model_at_end metric_for_best_model greater_is_better", _LAST_MODEL),
    **_each("include_for_metrics batch_eval_metrics prediction_loss_only include_inputs_for_metrics", _MEASURES),
    **_each("disable_tqdm include_num_input_tokens_seen skip_memory_metrics", _LOGGING),
    "logging_nan_inf_filter": "leave it out: a loss that is not finite stops the run before anything moves, and the samples are named",
    "run_name": "leave it out: a run has the name of its output_dir, in the project log.project",
    **_each(
        "save_strategy save_only_model save_on_each_node enable_jit_checkpoint",
        "leave it out: train.checkpoint_minutes and train.checkpoint_steps say when a checkpoint is written",
    ),
    "save_safetensors": "leave it out: weights are written as safetensors",
    **_each(
        "resume_from_checkpoint restore_callback_states_from_checkpoint ignore_data_skip",
        "leave it out: the same command goes on where output_dir holds a run that has not ended, with the very next sample",
    ),
    "overwrite_output_dir": "write another output_dir, or remove the old folder: a run is never overwritten",
    "do_train": "leave it out: fastllava train trains",
    "warmup_steps": "write optim.warmup_ratio, the share of all steps in which the learning rate rises",
    "lr_scheduler_kwargs": "leave it out: optim.schedule is cosine, linear or constant, and the first two fall to 0 at the end",
    **_each("optim_args optim_target_modules adafactor", _OPTIMIZER),
    "label_smoothing_factor": "leave it out: the loss is the supervised tokens' cross-entropy; train.loss_norm says how it is averaged",
    "average_tokens_across_devices": "write train.loss_norm=token, the mean over all supervised tokens of a step, or train.loss_norm=llava",
    "neftune_noise_alpha": "leave it out: no noise is added to embeddings",
    **_each(
        "group_by_length train_sampling_strategy",
        "write data.group_by_modality=true, which puts samples of one modality and of similar length into a step",
    ),
    **_each("length_column_name label_names remove_unused_columns", "leave it out: records are LLaVA's, and their lengths are counted"),
    "packing": "leave it out: samples are always packed without padding, and a step is train.global_batch samples all the same",
    **_each("local_rank no_cuda use_cpu", "leave it out: torchrun --nproc-per-node N takes N GPUs, and train.device=cpu none"),
    **_each("deepspeed accelerator_config parallelism_config", _SHARDING),
    "push_to_hub": "leave it out: nothing is uploaded; fastllava export writes a folder in Hugging Face's layout",
    "torch_compile_backend": "leave it out: train.compile uses Inductor",
    "attn_implementation": "write kernels.attention; fastllava toggles lists its values",
    **_each("use_liger_kernel liger_kernel_config", "write kernels.OP=liger for the ops that have it; fastllava toggles lists them"),
    "torch_empty_cache_steps": "leave it out: fastllava plan foresees what fits; a smaller train.micro_batch_tokens takes less",
    "use_cache": "leave it out: training keeps no cache of keys and values",
    "debug": _PROFILE,
    # DeepSpeed
    "train_micro_batch_size_per_gpu": _BATCH,
    **_each("communication_data_type prescale_gradients gradient_predivide_factor sparse_gradients", _SHARDING),
    "optimizer": _OPTIMIZER,
    "scheduler": "write optim.schedule (cosine, linear or constant) and optim.warmup_ratio",
    **_each("amp data_types", _PRECISION),
    "activation_checkpointing": "write train.recompute: norms, selective or full",
    **_each("steps_per_print dump_state csv_monitor comms_logger monitor_config", _LOGGING),
    **_each("tensorboard wandb trackio", "write log.backends, a list such as [wandb]"),
    **_each("wall_clock_breakdown flops_profiler memory_breakdown", _PROFILE),
    **_each("aio elasticity autotuning", "leave it out: fastllava plan foresees memory and time of a run before it starts"),
}
"""What to do about a foreign key that none here equals."""

_FAMILIES: Mapping[str, str] = {
    "bnb_": _QUANTISED,
    "eval_": _MEASURES,
    "log_": _LOGGING,
    "logging_": _LOGGING,
    "hub_": INSTEAD["push_to_hub"],
    "trackio_": INSTEAD["trackio"],
    "dataloader_": "leave it out: data.workers is the only setting of the loader, and no sample of an epoch is dropped",
    "ddp_": _SHARDING,
    "fsdp": _SHARDING,
    "zero_": _SHARDING,
}
"""Foreign keys that begin in this way and are not named above."""


def counterpart(name: str) -> str | None:
    """How a message about the foreign key `name` goes on: with the key that means the same or with a sentence; None for no foreign key."""
    if name in SAME:
        return f"; did you mean {SAME[name]}?"
    family = next((sentence for prefix, sentence in _FAMILIES.items() if name.startswith(prefix)), None)
    sentence = INSTEAD.get(name, family)
    return None if sentence is None else f": {sentence}"
