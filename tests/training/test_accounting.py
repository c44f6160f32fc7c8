"""The counted operations against PyTorch's own counter, and against the figures of LLaVA-1.5 7B."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import MptConfig, MptForCausalLM

from fastllava.batch import Batch, ImageSpec
from fastllava.config import LoraConfig, ModelConfig, Recompute, Stage
from fastllava.model.architecture import Architecture
from fastllava.model.execution import Execution
from fastllava.model.llama import LlamaConfig
from fastllava.model.ops import Ops, choose_ops
from fastllava.model.towers import ClipConfig
from fastllava.model.weights import load_llava
from fastllava.train.metrics.flops import Accounting, Rows, Work, peak_flops
from fastllava.train.stages import trained_parts

CPU = torch.device("cpu")
LENGTHS = (40, 40, 40)  # equal: then the reference's attention is one call, and every sample has its image first


def batch_of(images: int) -> Batch:
    """Three samples of 40 rows, the first `images` of them with the four patches of an image, five supervised rows each."""
    rows = sum(LENGTHS)
    patches = [40 * i + 1 + p for i in range(images) for p in range(4)]
    supervised = [40 * i + 30 + j for i in range(3) for j in range(5)]
    return Batch(
        token_ids=torch.ones(rows, dtype=torch.int64),
        position_ids=torch.arange(40).repeat(3),
        cu_seqlens=torch.tensor([0, 40, 80, 120], dtype=torch.int32),
        max_seqlen=40,
        pixels=torch.randint(0, 255, (images, 3, 28, 28), dtype=torch.uint8),
        patch_rows=torch.tensor(patches, dtype=torch.int32),
        text_rows=torch.tensor([row for row in range(rows) if row not in patches], dtype=torch.int32),
        supervised_rows=torch.tensor(supervised, dtype=torch.int32),
        targets=torch.ones(len(supervised), dtype=torch.int64),
        weights=torch.full((len(supervised),), 0.1),
    )


def write_mpt(folder: Path) -> Path:
    """An MPT whose heads are as wide as ALiBi's columns."""
    MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64)).save_pretrained(folder)
    return folder


# The reference's attention becomes plain products, which the counter sees; the op's, which is kept as one result, it does not.
@pytest.mark.parametrize(
    ("recompute", "last_layer", "attention_op", "family"),
    [
        ("none", "supervised", "reference", "llama"),
        ("none", "all", "reference", "llama"),
        ("norms", "supervised", "varlen", "llama"),
        ("selective", "supervised", "varlen", "llama"),
        ("selective", "all", "varlen", "llama"),
        ("full", "supervised", "reference", "llama"),
        ("none", "supervised", "reference", "mpt"),
        ("selective", "supervised", "varlen", "mpt"),
        ("full", "all", "reference", "mpt"),
        ("none", "supervised", "reference", "lora"),
        ("none", "all", "reference", "lora"),
    ],
)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_within_one_percent_of_pytorch_s_counter(
    world: Path, tmp_path: Path, stage: Stage, recompute: Recompute, last_layer: Rows, attention_op: str, family: str
) -> None:
    if (stage, family) == ("pretrain", "lora"):
        pytest.skip("adapters are for stage finetune")
    reference = dict.fromkeys(("masked_linear_cross_entropy", "projector_splice", "lora_linear"), "reference")
    ops = Ops(choose_ops(reference, CPU, torch.float32).chosen | {"attention": attention_op})
    llm = write_mpt(tmp_path) if family == "mpt" else world / "llm"
    lora = LoraConfig(rank=8, targets=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]) if family == "lora" else None
    model = load_llava(ModelConfig(llm=llm, vision_tower=world / "clip"), Execution(ops, torch.float32, recompute, last_layer), 0, lora)
    model.requires_grad_(False)
    for part in trained_parts(model, stage):
        part.requires_grad_(True)
    # Of the whole square, as the counter knows no mask.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch_of(2)).backward()
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = counted.pop("aten.bmm", 0)

    accounting = Accounting.of_model(model.origin, stage, recompute, last_layer)
    flops = accounting.hardware_flops(Work.of(LENGTHS, [1, 1, 0], [5, 5, 5]))
    tower = model.tower.config
    tower_attention = 2 * accounting.blocks * 4 * tower.hidden_size * (tower.patches + 1) ** 2
    assert sum(counted.values()) == pytest.approx(flops.total - flops.attention - tower_attention, rel=0.01), counted
    square, triangle = sum(length**2 for length in LENGTHS), sum(length * (length + 1) // 2 for length in LENGTHS)
    if attention_op == "reference":
        assert attention == pytest.approx(flops.attention * square / triangle + tower_attention, rel=0.01)


SEVEN_B_MODEL = Architecture(
    llm=LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
        head_dim=128, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, qkv_bias=False, output_bias=False, mlp_bias=False, tied=False,
        window=None,
    ),
    tower=ClipConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14),
    select_layer=-2,
    projector_type="mlp2x_gelu",
    spec=ImageSpec(336, 576, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
)  # fmt: skip
SEVEN_B = Accounting.of_model(SEVEN_B_MODEL, "pretrain")


def test_seven_b_by_hand() -> None:
    """202.4e6 weights a layer, 168.8e6 of them behind keys and values; CLIP-L/336 does about 0.36e12 operations an image."""
    work = Work.of([640] * 16, [1] * 16, [32] * 16)
    flops = SEVEN_B.model_flops(work)
    assert flops.decoder == pytest.approx(4 * (6.476e9 * 10240 - 168.8e6 * (10240 - 512)), rel=1e-3)
    assert flops.tower / 16 == pytest.approx(0.36e12, rel=0.05)
    assert flops.projector == pytest.approx(9216 * 2 * (2 * 1024 * 4096 + 3 * 4096 * 4096), rel=1e-6)
    assert flops.head == pytest.approx(4 * 512 * 4096 * 32000, rel=1e-6)
    convention = SEVEN_B.model_flops(work, "all")
    assert convention.head == pytest.approx(20 * flops.head)
    assert convention.decoder == pytest.approx(4 * 6.476e9 * 10240, rel=1e-3)
    assert dataclasses.replace(SEVEN_B, last_layer="all").hardware_flops(work).decoder == convention.decoder
    finetune = dataclasses.replace(SEVEN_B, stage="finetune")
    assert finetune.model_flops(work).decoder == pytest.approx(1.5 * flops.decoder)
    again = dataclasses.replace(SEVEN_B, recompute="selective").hardware_flops(work)
    assert again.decoder - flops.decoder == pytest.approx(180.4e6 * (31 * 10240 + 512), rel=1e-3)
    assert again.attention == flops.attention
    full = dataclasses.replace(SEVEN_B, recompute="full", last_layer="all")
    assert full.hardware_flops(work).decoder == pytest.approx((6 * 6.476e9 - 2 * 32 * 4096 * 11008) * 10240, rel=1e-3)
    assert full.model_flops(work) == flops


def test_adapters_of_seven_b_by_hand() -> None:
    """A and B of rank 128 on 7 layers: 2.5e6 values of each a decoder layer for queries, keys, values and output, 5.4e6 for the MLP."""
    work = Work.of([640] * 16, [1] * 16, [32] * 16)
    architecture = dataclasses.replace(SEVEN_B_MODEL, lora=LoraConfig(rank=128))
    frozen, adapted = SEVEN_B.model_flops(work), Accounting.of_model(architecture, "finetune").model_flops(work)
    square, inner = 128 * 2 * 4096, 128 * (4096 + 11008)
    every_row, supervised_rows = 31 * 10240 * (4 * square + 3 * inner) + 10240 * 2 * square, 512 * (2 * square + 3 * inner)
    assert adapted.decoder - frozen.decoder == 3 * 2 * (every_row + supervised_rows)
    assert (adapted.head, adapted.attention) == (frozen.head, frozen.attention)
    of = lambda recompute: Accounting.of_model(architecture, "finetune", recompute, "all").hardware_flops(work).decoder  # noqa: E731
    rows = 32 * 10240
    into, down = 128 * (4 + 2) * 4096 + 128 * 11008, 128 * 4096
    assert of("norms") - of("none") == 2 * rows * into
    assert of("selective") - of("norms") == 2 * rows * 2 * (4096 * 11008 + 128 * 11008)
    assert of("full") - of("none") == 2 * rows * (4 * 4096**2 + 2 * 4096 * 11008 + 4 * square + 3 * inner - down)


def test_fewer_tokens_of_an_image_are_fewer_operations() -> None:
    """By hand: of VILA's projector a token goes through 4096 x 4096 and 4096 x 4096, both with both gradients."""
    joined = dataclasses.replace(SEVEN_B_MODEL, projector_type="mlp_downsample", spec=dataclasses.replace(SEVEN_B_MODEL.spec, patches=144))
    accounting = Accounting.of_model(joined, "pretrain")
    assert accounting.projector == 144 * 6 * (4 * 1024 * 4096 + 4096 * 4096)
    # The decoder sees the difference in its rows, which the caller counts.
    before, after = SEVEN_B.model_flops(Work.of([640], [1], [32])), accounting.model_flops(Work.of([640 - 432], [1], [32]))
    assert after.tower == before.tower
    assert after.decoder < before.decoder / 3


def test_work_adds_up() -> None:
    assert Work.of([3, 4], [1, 0], [2, 0]) == Work(rows=7, pairs=6 + 10, images=1, supervised=2)
    assert Work.of([70_000], [0], [0]).pairs == 70_000 * 70_001 // 2, "more than 32 bits hold"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("T4", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
