"""The planner's memory against what a real step allocates, by PyTorch's record of every allocation and release on a CPU.

That record also has what libraries allocate within an op and give back before it ends, which tensors without data do not show.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benches import budget
from benches.lib.timing import allocations
from fastllava.batch import Batch, ImageSpec
from fastllava.config import TARGETS, Config, LoraConfig, Quantize, Target, check_config
from fastllava.model.architecture import Architecture
from fastllava.model.build import build_llava, build_projector
from fastllava.model.execution import COMPUTE_DTYPE, Execution
from fastllava.model.llama import Llama, LlamaConfig
from fastllava.model.ops import Ops, reference_ops
from fastllava.model.quantised import put, weights_by_name
from fastllava.model.towers import ClipConfig
from fastllava.optim import FiniteGuard, build_optimizer, low_bit
from fastllava.planner.simulate import MicroBatch, gpu_ops, simulate
from fastllava.planner.sizes import size_named
from fastllava.planner.tally import SUMS, part_of
from fastllava.train import train_step
from fastllava.train.stages import prepare_stage
from fastllava_kernels import choose, rooms
from fastllava_kernels._device import nf4

CPU = torch.device("cpu")
LLAMA = LlamaConfig(
    vocab_size=600, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, head_dim=24,
    rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, qkv_bias=False, output_bias=False, mlp_bias=False, tied=False, window=None,
)  # fmt: skip
CLIP = ClipConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
SPEC = ImageSpec(28, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TINY = Architecture(llm=LLAMA, tower=CLIP, select_layer=-2, projector_type="mlp2x_gelu", spec=SPEC)
SIZE = MicroBatch(rows=600, samples=6, images=3, supervised=60, longest=100)


def config_of(stage: str, precision: str, recompute: str, **optim: str) -> Config:
    train = {"precision": precision, "recompute": recompute}
    values = {"stage": stage, "output_dir": "o", "model": {"llm": "l"}, "data": {"records": "r"}, "train": train}
    return check_config(values | {"optim": optim})


def cpu_ops(dtype: torch.dtype) -> Ops:
    """The ops of a CPU that fake tensors can pass through too."""
    return Ops({name: choose(room, "auto", CPU, dtype) for name, room in rooms().items()} | {"attention": "sdpa"})


def real_batch() -> Batch:
    torch.manual_seed(1)
    patches = [100 * image + 1 + patch for image in range(3) for patch in range(4)]
    supervised = [100 * sample + 80 + i for sample in range(6) for i in range(10)]
    return Batch(
        token_ids=torch.randint(0, 600, (600,)),
        position_ids=torch.arange(100).repeat(6),
        cu_seqlens=torch.arange(0, 601, 100, dtype=torch.int32),
        max_seqlen=100,
        pixels=torch.randint(0, 255, (3, 3, 28, 28), dtype=torch.uint8),
        patch_rows=torch.tensor(patches, dtype=torch.int32),
        text_rows=torch.tensor([row for row in range(600) if row not in patches], dtype=torch.int32),
        supervised_rows=torch.tensor(supervised, dtype=torch.int32),
        targets=torch.randint(0, 600, (60,)),
        weights=torch.full((60,), 1 / 120),
    )


def measured(config: Config, ops: Ops, llama: LlamaConfig = LLAMA, architecture: Architecture = TINY) -> int:
    """The most bytes at once in a step of two micro-batches."""
    dtype = COMPUTE_DTYPE[config.train.precision]
    model = build_llava(dataclasses.replace(architecture, llm=llama), Execution.of(config, ops)).to_empty(device=CPU)
    for name, weight in weights_by_name(model).items():
        put(model, name, 0.02 * torch.randn(weight.shape, dtype=dtype))
    trained = prepare_stage(model, config)
    optimizer = build_optimizer(trained.items(), config.optim)
    guard, batch = FiniteGuard(optimizer, CPU), real_batch()
    if config.lora.draws:
        batch = dataclasses.replace(batch, row_keys=torch.arange(len(batch.token_ids)))

    def step() -> None:
        train_step(model, optimizer, guard, [batch, batch], CPU, config.optim.max_grad_norm)

    step()
    held = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    now = most = sum(tensor.nbytes for tensor in held)
    for change in allocations(step)[1]:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("stage", "precision", "recompute"),
    [("pretrain", "fp32", "none"), ("finetune", "bf16", "none"), ("finetune", "bf16", "full")],
)
def test_memory_is_within_a_twentieth_of_what_a_step_allocates(stage: str, precision: str, recompute: str) -> None:
    config = config_of(stage, precision, recompute)
    ops = cpu_ops(COMPUTE_DTYPE[config.train.precision])
    predicted = simulate(config, TINY, ops, SIZE, accumulates=True)
    taken = measured(config, ops)
    assert predicted.peak == pytest.approx(taken, rel=0.05)


def test_memory_of_low_bit_states(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    # What a CPU has in fp32 on the way stays in a GPU's one kernel.
    monkeypatch.setattr(low_bit, "_PIECE", 16384)
    config, ops = config_of("finetune", "bf16", "full", state="8bit", master="bf16"), cpu_ops(torch.bfloat16)
    shallow = dataclasses.replace(LLAMA, num_hidden_layers=2)
    predicted = simulate(config, dataclasses.replace(TINY, llm=shallow), ops, SIZE, accumulates=True)
    assert predicted.peak == pytest.approx(measured(config, ops, shallow), rel=0.05)
    parameters = predicted.memory["gradients"] / 4
    assert predicted.memory["master weights"] == 2 * parameters
    # A byte each, and 4 for every 256; those of the norms and biases are fp32.
    assert predicted.memory["optimizer"] == pytest.approx((2 + 8 / 256) * parameters, rel=0.05)


# With dropout a CPU has inputs without their dropped values, and random numbers, on the way within an op; a GPU has them in registers.
@pytest.mark.parametrize(
    ("recompute", "dropout"),
    [
        pytest.param("none", 0.0, marks=pytest.mark.exhaustive),
        ("none", 0.05),
        pytest.param("selective", 0.0, marks=pytest.mark.exhaustive),
        ("full", 0.0),
    ],
)
def test_memory_of_adapters(recompute: str, dropout: float) -> None:
    config, lora = config_of("finetune", "bf16", recompute), LoraConfig(rank=8, dropout=dropout)
    config, ops = config.model_copy(update={"lora": lora}), cpu_ops(torch.bfloat16)
    adapted = dataclasses.replace(TINY, lora=lora)
    predicted = simulate(config, adapted, ops, SIZE, accumulates=True)
    assert predicted.peak == pytest.approx(measured(config, ops, architecture=adapted), rel=0.05)
    trained = 6 * 8 * (4 * 2 * 96 + 3 * (96 + 256)) + sum(p.numel() for p in build_projector(TINY, reference_ops()).parameters())
    assert predicted.memory["master weights"] == predicted.memory["gradients"] == 4 * trained


QUANTISABLE = dataclasses.replace(LLAMA, hidden_size=128, intermediate_size=320, head_dim=32)
"""Rows of whole blocks, as those of models are."""


@pytest.mark.parametrize(
    ("quantize", "recompute", "targets"),
    [pytest.param("nf4", "none", TARGETS, marks=pytest.mark.exhaustive), ("nf4_double", "full", TARGETS[:3])],
)
def test_memory_of_adapters_over_quantised_weights(
    quantize: Quantize, recompute: str, targets: Sequence[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A block of a weight is to the rest what it is in a real model, and what a CPU has in fp32 on the way stays in a GPU's one kernel.
    monkeypatch.setattr(nf4, "AT_ONCE", 8192)
    config, lora = config_of("finetune", "bf16", recompute), LoraConfig(rank=8, dropout=0.0, targets=list(targets))
    config = config.model_copy(update={"lora": lora, "model": config.model.model_copy(update={"quantize": quantize})})
    ops, adapted = cpu_ops(torch.bfloat16), dataclasses.replace(TINY, llm=QUANTISABLE, lora=lora, quantize=quantize)
    predicted = simulate(config, adapted, ops, SIZE, accumulates=True)
    assert predicted.peak == pytest.approx(measured(config, ops, QUANTISABLE, adapted), rel=0.05)
    dense = simulate(config, dataclasses.replace(adapted, quantize=None), ops, SIZE, accumulates=True)
    weights = 6 * sum(QUANTISABLE.products().values())
    bits = 4 + 32 / 64 if quantize == "nf4" else 4 + 8 / 64 + 32 / 64 / 256
    saved = dense.memory["frozen weights"] - predicted.memory["frozen weights"]
    assert saved == pytest.approx((2 - bits / 8) * weights, rel=0.01)
    # Written once forward and once backward, and where all is computed again, once more.
    assert predicted.traffic["dequantised weights"] >= 2 * 2 * weights


def test_kinds_are_what_the_stage_keeps() -> None:
    parameters = sum(p.numel() for p in Llama(LLAMA, cpu_ops(torch.bfloat16)).parameters())
    parameters += sum(p.numel() for p in build_projector(TINY, reference_ops()).parameters())
    memory = simulate(config_of("finetune", "bf16", "none"), TINY, gpu_ops({}), SIZE, accumulates=True).memory
    assert memory["master weights"] == memory["gradients"] == 4 * parameters
    assert memory["optimizer"] == pytest.approx(8 * parameters, rel=1e-3)
    frozen = simulate(config_of("pretrain", "bf16", "none"), TINY, gpu_ops({}), SIZE, accumulates=True).memory
    assert frozen["frozen weights"] > 2 * sum(p.numel() for p in Llama(LLAMA, cpu_ops(torch.bfloat16)).parameters())
    assert frozen["activations"] < memory["activations"]


def test_eight_processes_hold_an_eighth_each() -> None:
    config = config_of("finetune", "bf16", "none")
    alone = simulate(config, TINY, gpu_ops({}), SIZE, accumulates=True)
    shared = simulate(config, TINY, gpu_ops({}), SIZE, accumulates=True, world=8)
    for kind in ("master weights", "optimizer", "gradients"):
        # But for what does not divide by eight, and a step count a parameter.
        assert shared.memory[kind] == pytest.approx(alone.memory[kind] / 8, rel=0.01)
    assert shared.memory["frozen weights"] == alone.memory["frozen weights"], "the tower is whole everywhere"
    # Gathered for forward and backward in bf16, the root's once in fp32; reduced in fp32.
    layers = 6 * (4 * 96 * 96 + 3 * 96 * 256 + 2 * 96)
    root = alone.memory["master weights"] // 4 - layers
    assert shared.communicated == pytest.approx((2 * 2 + 4) * layers + (4 + 4) * root, rel=0.02)
    assert alone.communicated == 0


def test_the_first_of_a_size_costs_what_it_does_again() -> None:
    """DTensor works out an op of new sizes once, on whole tensors: that must not look like memory."""
    origin = dataclasses.replace(TINY, llm=dataclasses.replace(LLAMA, hidden_size=88, head_dim=22, intermediate_size=888))
    first, again = (
        simulate(config_of("finetune", "bf16", "none"), origin, gpu_ops({}), SIZE, accumulates=False, world=8).memory for _ in range(2)
    )
    assert first == again


def test_a_frozen_decoder_is_sharded_or_whole_as_the_config_says() -> None:
    config = config_of("pretrain", "bf16", "none")
    frozen = {}
    for way in ("replicate", "shard"):
        changed = config.model_copy(update={"parallel": config.parallel.model_copy(update={"frozen": way})})
        frozen[way] = simulate(changed, TINY, gpu_ops({}), SIZE, accumulates=False, world=8).memory["frozen weights"]
    weights = 2 * sum(p.numel() for p in Llama(LLAMA, gpu_ops({})).parameters())
    assert frozen["replicate"] - frozen["shard"] == pytest.approx(weights * 7 / 8, rel=0.01)


def bytes_of_a_layer(stage: str, origin: Architecture = TINY, size: MicroBatch = SIZE) -> dict[str, int]:
    """What one more layer in the middle of the decoder moves for a micro-batch, by part."""
    config, costs = config_of(stage, "bf16", "none"), []
    if origin.lora is not None:
        config = config.model_copy(update={"lora": origin.lora})
    for layers in (6, 7):
        deeper = dataclasses.replace(origin, llm=dataclasses.replace(origin.llm, num_hidden_layers=layers))
        costs.append(simulate(config, deeper, gpu_ops({}), size, accumulates=True).traffic)
    few, more = costs
    return {part: more[part] - few[part] for part in more}


def test_bytes_of_a_layers_adapters() -> None:
    """Counted by hand, as below; R the rank. Products have their operands and results; here is what low-rank ones move besides."""
    rows, width, inner, rank = SIZE.rows, LLAMA.hidden_size, LLAMA.intermediate_size, 8
    layer = bytes_of_a_layer("finetune", dataclasses.replace(TINY, lora=LoraConfig(rank=rank)))
    inputs, outputs = 3 * width + inner, 5 * width + 2 * inner
    # Forward reads four inputs and writes seven results of A, and adds to seven results.
    forward = 2 * rows * (inputs + 7 * rank + 2 * outputs)
    # Backward reads seven gradients twice and the inputs once, and adds to the inputs' gradients for each of seven layers.
    backward = 2 * rows * (2 * outputs + inputs + 2 * (3 * width + width + 2 * width + inner))
    assert layer["adapters"] == forward + backward
    # The adapters' own casts, sums and updates are as small as they are.
    assert layer["casts"] + layer["gradient adds"] + layer["other"] < 0.1 * layer["adapters"]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_bytes_of_a_layer_by_part(stage: str) -> None:
    """Counted by hand. T rows, D width, F inner; bf16 is 2 bytes, fp32 4; norms' own weights and statistics aside."""
    rows, width, inner = SIZE.rows, LLAMA.hidden_size, LLAMA.intermediate_size
    layer = bytes_of_a_layer(stage)
    # Gate and up in, their product out; backward has the incoming gradient too and puts out two.
    assert layer["swiglu"] == 2 * rows * inner * (3 + 5)
    # Queries and keys in and out, and fp32 sines and cosines in, in both passes.
    assert layer["rope"] == 2 * (rows * width * 2 * 2 * 2 + rows * LLAMA.head_dim * 4)
    weights = 4 * width * width + 3 * width * inner
    trains = stage == "finetune"
    # fp32 weights read and bf16 written once for both micro-batches; gradients are summed within the products.
    assert layer["casts"] == pytest.approx(6 / 2 * weights if trains else 0, rel=0.02, abs=200)
    assert layer["gradient adds"] < 0.05 * weights
    # What trains adds 4 bytes a weight to 4 that are there; the second and third of q, k, v and of gate, up add to an input's gradient.
    assert layer[SUMS] == (8 * weights if trains else 0) + 3 * 2 * rows * width
    assert layer["norms"] > 2 * rows * width * 10


def committed_bytes(repo: Path, stage: str) -> dict[str, float]:
    """The bytes of a layer in the committed table of ops, by the planner's part; GB with three digits."""
    text = (repo / "kernels/budget.md").read_text(encoding="utf-8")
    table = text[text.index("Op by op") : text.index("## Triton kernels")]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    found: dict[str, float] = {}
    for cells in lines:
        name = cells[1].strip("`").partition(" ")[0]
        part = "products" if name in ("aten::mm", "aten::addmm") else "attention" if "attention" in name else part_of(name)
        found[part] = found.get(part, 0.0) + 1e9 * float(cells[head.index(stage) + 1])
    return found


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_bytes_of_a_layer_are_those_of_the_committed_table(repo: Path, stage: str) -> None:
    """What the planner prices is what kernels/budget.md lists, part by part; products and attention have prices of their own."""
    size = size_named(budget.SIZE)
    committed, priced = committed_bytes(repo, stage), bytes_of_a_layer(stage, size.origin, budget.MICRO_BATCH)
    assert {"norms", "rope", "swiglu"} < committed.keys() & priced.keys()
    for part in (committed.keys() | priced.keys()) - {"products", "attention", SUMS}:
        # Each op of the table is rounded to a thousandth of a GB.
        assert priced.get(part, 0) == pytest.approx(committed.get(part, 0), abs=2e6), f"{part}; {budget.COMMAND}"
    llm, rows = size.llm, budget.MICRO_BATCH.rows
    sizes = [(llm.hidden_size, llm.hidden_size)] * 4 + [(llm.hidden_size, llm.intermediate_size)] * 3
    weights = sum(takes * gives for takes, gives in sizes)
    operands = 2 * sum(rows * (takes + gives) + takes * gives for takes, gives in sizes)
    # Forward and both gradients, whose bf16 results are theirs; of a weight's gradient the product reads and writes fp32.
    trains = stage == "finetune"
    plain = (2 + trains) * operands - (2 * weights if trains else 0)
    assert committed["products"] == pytest.approx(plain + priced[SUMS], abs=5e6)
