"""MMBench-CN: the questions of MMBench in Chinese, asked with a Chinese sentence after an English system prompt."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fastllava.evaluate.benchmarks.mmbench import MMBench


class MMBenchCN(MMBench):
    """The Chinese dev split of 2023-10-03."""

    name = "mmbench_cn"
    title = "MMBench-CN (dev)"
    folder = "mmbench_cn"
    published: ClassVar[Mapping[str, float]] = {"7b": 58.3, "13b": 63.6}
    file = "mmbench_dev_cn_20231003.tsv"
    sentence = "\n请直接回答选项字母。"
    source = (
        "download mmbench_dev_cn_20231003.tsv from "
        "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_cn_20231003.tsv"
    )

    def path(self, data: Path) -> Path:
        """Where the table is: the original's documentation puts it into the folder mmbench, its script reads mmbench_cn. Raises Missing."""
        beside = data.parent / "mmbench" / self.file
        return beside if beside.exists() and not (data / self.file).exists() else super().path(data)

    def need(self, path: Path) -> Path:
        """`path` when it is there, or when it is the folder mmbench_cn and the table lies in mmbench. Raises Missing."""
        return path if (path.parent / "mmbench" / self.file).exists() else super().need(path)
