"""What a decoder layer dispatches and moves, beside the least."""

import pytest

from fastllava.config import Config, check_config
from fastllava.planner.layer import Layer, look_at
from fastllava.planner.simulate import MicroBatch
from fastllava.planner.sizes import size_named
from fastllava.planner.tally import BACKWARD, FORWARD

SIZE = MicroBatch(rows=600, samples=6, images=3, supervised=60, longest=100)
ROWS, WIDTH, INNER, QUERIES, KEYS = 600, 64, 96, 64, 32


def config_of(stage: str, recompute: str) -> Config:
    train = {"precision": "bf16", "recompute": recompute}
    return check_config({"stage": stage, "output_dir": "o", "model": {"llm": "l"}, "data": {"records": "r"}, "train": train})


def products(layer: Layer, part: str) -> float:
    """How many matrix products a part of the step dispatches."""
    return sum(op.count for (where, name), op in layer.ops.items() if where == part and name in ("aten::mm", "aten::addmm"))


@pytest.fixture(scope="module")
def layers() -> dict[tuple[str, str], Layer]:
    cases = [("finetune", "none"), ("finetune", "full"), ("pretrain", "none")]
    return {case: look_at(config_of(*case), size_named("tiny"), SIZE) for case in cases}


def test_products_move_their_operands_and_results(layers: dict[tuple[str, str], Layer]) -> None:
    one = layers["finetune", "none"].ops
    sizes = [(WIDTH, QUERIES), (WIDTH, KEYS), (WIDTH, KEYS), (QUERIES, WIDTH), (WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
    moved = sum(2 * (ROWS * (takes + gives) + takes * gives) for takes, gives in sizes)
    assert (one[FORWARD, "aten::mm"].count, one[FORWARD, "aten::mm"].bytes) == (7, moved)
    assert products(layers["finetune", "none"], BACKWARD) == 14
    # In a frozen layer only the gradients of inputs: those of q, k, v and of gate, up are added up, reading what is there.
    frozen = layers["pretrain", "none"].ops
    both = frozen[BACKWARD, "aten::mm"].bytes + frozen[BACKWARD, "aten::addmm"].bytes
    assert both == moved + 3 * 2 * ROWS * WIDTH


def test_a_frozen_layer_dispatches_nothing_for_its_weights(layers: dict[tuple[str, str], Layer]) -> None:
    trained, frozen = layers["finetune", "none"], layers["pretrain", "none"]
    assert products(frozen, BACKWARD) == 7
    weights = 4 * (2 * WIDTH * QUERIES + 2 * WIDTH * KEYS + 3 * WIDTH * INNER)
    # Its products' inputs and output gradients once more, and fp32 sums read and written; the norms' two weights are bf16 in a floor.
    operands = 2 * ROWS * ((WIDTH + QUERIES + 2 * KEYS) + (QUERIES + WIDTH) + (WIDTH + 2 * INNER) + (INNER + WIDTH))
    assert trained.floor[BACKWARD] - frozen.floor[BACKWARD] == 2 * weights + operands + 2 * 2 * WIDTH
    assert trained.floor[FORWARD] == frozen.floor[FORWARD]


def test_recompute_adds_what_it_repeats(layers: dict[tuple[str, str], Layer]) -> None:
    none, full = layers["finetune", "none"], layers["finetune", "full"]
    # Of two micro-batches the second finds the weights cast, where nothing is computed again; a cast reads 4 bytes and writes 2.
    assert full.total(FORWARD).count - none.total(FORWARD).count == 7 / 2
    weights = 2 * WIDTH * QUERIES + 2 * WIDTH * KEYS + 3 * WIDTH * INNER
    assert full.total(FORWARD).bytes - none.total(FORWARD).bytes == 6 * weights / 2
    assert products(full, BACKWARD) - products(none, BACKWARD) == 6, "all but down_proj"
    # down_proj's forward is not repeated, and the sum of the first norm is there: it reads and writes one tensor less.
    down = 2 * (ROWS * (INNER + WIDTH) + INNER * WIDTH)
    assert full.floor[BACKWARD] - none.floor[BACKWARD] == full.floor[FORWARD] - down - 2 * 2 * ROWS * WIDTH


def test_the_sum_after_the_mlp_is_the_next_norms(layers: dict[tuple[str, str], Layer]) -> None:
    """Nothing is added outside of a norm or a product, forward or backward, whatever is computed again."""
    for case, layer in layers.items():
        assert not [name for _, name in layer.ops if name.startswith("aten::add bfloat16")], case
        assert layer.ops[FORWARD, "fastllava::add_rms_norm_triton"].count == 2
        assert layer.ops[BACKWARD, "fastllava::add_rms_norm_triton_backward"].count == 2


def test_nothing_moves_less_than_the_floor(layers: dict[tuple[str, str], Layer]) -> None:
    for layer in layers.values():
        for part in (FORWARD, BACKWARD):
            assert layer.floor[part] <= layer.total(part).bytes < 2 * layer.floor[part]
