"""Keys of LLaVA, transformers and DeepSpeed in a config lead to the right key here, or to a sentence."""

import dataclasses

import pytest
import transformers

from fastllava.config import check_config, key_names
from fastllava.config.foreign import INSTEAD, SAME, counterpart
from fastllava.errors import UserError
from fastllava_kernels import rooms

OURS = {key.rpartition(".")[2] for key in key_names()}

# ModelArguments, DataArguments and TrainingArguments of llava/train/train.py (c121f04), without what they inherit from transformers.
LLAVA = """
    model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer pretrain_mm_mlp_adapter
    mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type mm_vision_select_feature data_path lazy_preprocess
    is_multimodal image_folder image_aspect_ratio cache_dir optim remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl
    model_max_length double_quant quant_type bits lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr
    group_by_modality_length
"""

# The top level of DeepSpeed's configuration.
DEEPSPEED = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer scheduler fp16 bf16 amp
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer communication_data_type prescale_gradients
    gradient_predivide_factor sparse_gradients activation_checkpointing steps_per_print wall_clock_breakdown dump_state flops_profiler
    tensorboard wandb csv_monitor comms_logger aio elasticity autotuning data_types
"""

# As the scripts of people who come from there have them, whichever release they use.
TRANSFORMERS = """
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate weight_decay adam_beta1 adam_beta2
    adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps logging_dir
    logging_steps logging_strategy save_strategy save_steps save_total_limit save_safetensors evaluation_strategy eval_steps seed
    data_seed bf16 fp16 tf32 local_rank ddp_backend ddp_find_unused_parameters dataloader_num_workers dataloader_pin_memory
    dataloader_drop_last run_name disable_tqdm deepspeed fsdp fsdp_config group_by_length report_to resume_from_checkpoint
    overwrite_output_dir gradient_checkpointing gradient_checkpointing_kwargs torch_compile attn_implementation use_liger_kernel
    neftune_noise_alpha push_to_hub hub_model_id auto_find_batch_size label_smoothing_factor do_train do_eval no_cuda use_cpu
"""


def complaint(key: str, value: object) -> str:
    """The one line about `key` in a config that is whole but for it."""
    given = {"stage": "finetune", "output_dir": "o", "model": {"llm": "l"}, "data": {"records": "r"}, key: value}
    with pytest.raises(UserError) as caught:
        check_config(given)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("name", sorted({*LLAVA.split(), *DEEPSPEED.split(), *TRANSFORMERS.split()} - {"optim"}))
def test_each_is_answered(name: str) -> None:
    line = complaint(name, 16)
    if name in OURS:
        (ours,) = (key for key in key_names() if key.rpartition(".")[2] == name)
        assert line == f"{name}: no such key; did you mean {ours}?"
    elif name in SAME:
        assert line == f"{name}: no such key; did you mean {SAME[name]}?"
    else:
        assert line.startswith(
            (f"{name}: no such key: write ", f"{name}: no such key: leave it out", f"{name}: no such key: this version ")
        )


def test_no_argument_of_transformers_is_answered_by_its_spelling_alone() -> None:
    """A name that is only alike would send people to a key of another meaning."""
    names = [field.name for field in dataclasses.fields(transformers.TrainingArguments) if field.name not in {"output_dir", "optim"}]
    assert len(names) > 80
    unanswered = [name for name in names if name not in OURS and counterpart(name) is None]
    assert [name for name in unanswered if "did you mean" in complaint(name, 1)] == []


def test_samples_a_device_are_not_the_samples_of_a_step() -> None:
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        line = complaint(name, 16)
        assert "did you mean" not in line
        assert "train.global_batch, the samples of one optimizer step: samples a device x devices x accumulation steps" in line
    assert complaint("train_batch_size", 128) == "train_batch_size: no such key; did you mean train.global_batch?"


def test_a_section_of_deepspeed_s_and_a_foreign_key_in_a_section_of_ours() -> None:
    assert complaint("zero_optimization", {"stage": 3}).startswith("zero_optimization: no such key: leave it out: under torchrun FSDP2 ")
    assert complaint("train", {"num_train_epochs": 1}) == "train.num_train_epochs: no such key; did you mean train.epochs?"


def test_the_tables_name_keys_that_exist_and_none_twice() -> None:
    assert set(SAME.values()) <= set(key_names())
    assert not set(SAME) & set(INSTEAD)
    assert not [name for name in {*key_names(), *OURS, *rooms()} if counterpart(name)]
    named = {word.strip(".,;:()").partition("=")[0] for sentence in INSTEAD.values() for word in sentence.split()}
    sections = {key.partition(".")[0] for key in key_names() if "." in key} | {"kernels"}
    dotted = {word for word in named if word.partition(".")[0] in sections and "." in word}
    assert dotted - set(key_names()) <= {"parallel.*", "kernels.OP", "kernels.attention"}
    assert len(dotted) > 15
