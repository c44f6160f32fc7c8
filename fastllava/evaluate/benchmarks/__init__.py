"""The benchmarks by name, in the order of the original's table. One module a benchmark, named as `score` and `eval` take it."""

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import Benchmark
from fastllava.evaluate.benchmarks.gqa import GQA
from fastllava.evaluate.benchmarks.llava_bench import LlavaBench
from fastllava.evaluate.benchmarks.mm_vet import MMVet
from fastllava.evaluate.benchmarks.mmbench import MMBench
from fastllava.evaluate.benchmarks.mmbench_cn import MMBenchCN
from fastllava.evaluate.benchmarks.mme import MME
from fastllava.evaluate.benchmarks.pope import Pope
from fastllava.evaluate.benchmarks.scienceqa import ScienceQA
from fastllava.evaluate.benchmarks.seed_bench import SeedBench
from fastllava.evaluate.benchmarks.textvqa import TextVQA
from fastllava.evaluate.benchmarks.vizwiz import VizWiz
from fastllava.evaluate.benchmarks.vqav2 import VQAv2

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one
    for one in (
        VQAv2(),
        GQA(),
        VizWiz(),
        ScienceQA(),
        TextVQA(),
        Pope(),
        MME(),
        MMBench(),
        MMBenchCN(),
        SeedBench(),
        LlavaBench(),
        MMVet(),
    )
}


def benchmark(name: str) -> Benchmark:
    """The benchmark called `name`. Raises UserError that lists the names."""
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark '{name}'; write one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
